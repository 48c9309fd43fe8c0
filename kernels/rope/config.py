"""Tile sizes as a pure function of the head's width: no search at run time.

Elementwise: a thread moves one 16-byte piece of bf16 for each load there is. Halves are loaded apart, so it holds 16
elements; neighbours are loaded together, so it holds 8 (with 16, rows without alignment need 254 registers on sm_90 and
spill on gfx942). The table comes from the cache. Four warps, so that programs are small and many.
"""

from dataclasses import dataclass

ELEMENTS = {"half": 2_048, "interleaved": 1_024}


@dataclass(frozen=True)
class Tile:
    """Rows of a program's tile, pairs of a row (at least those that exist), warps."""

    block_rows: int
    block_half: int
    warps: int = 4


def tile(d_head: int, pairing: str) -> Tile:
    """The tile for heads of this width."""
    block_half = max(1 << max(d_head // 2 - 1, 0).bit_length(), 8)
    return Tile(max(ELEMENTS[pairing] // (2 * block_half), 1), block_half)
