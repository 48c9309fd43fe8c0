"""Tile sizes as a pure function of the head's width: no search at run time.

Elementwise: 8 elements of x a thread, that is one 16-byte load of bf16, and twice as many bytes of the table, which
comes from the cache; four warps, so that programs are small and many. With 16 elements a thread rows without
alignment need all registers (254 on sm_90) and spill on gfx942.
"""

from dataclasses import dataclass

ELEMENTS = 1_024


@dataclass(frozen=True)
class Tile:
    """Rows of a program's tile, pairs of a row (at least those that exist), warps."""

    block_rows: int
    block_half: int
    warps: int = 4


def tile(d_head: int) -> Tile:
    """The tile for heads of this width."""
    block_half = max(1 << max(d_head // 2 - 1, 0).bit_length(), 8)
    return Tile(max(ELEMENTS // (2 * block_half), 1), block_half)
