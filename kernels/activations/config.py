"""Tile sizes as a pure function of the width: no search at run time.

Elementwise, so what counts is bytes in flight: 16 elements a thread in the forward (two 16-byte loads of each operand
in bf16) and 8 in the backward, which has three operands and keeps slopes in registers; four warps, so that sixteen
programs fit on a multiprocessor. Wide rows are cut into strips, short ones share a tile.
"""

from dataclasses import dataclass

FORWARD_ELEMENTS = 2_048
BACKWARD_ELEMENTS = 1_024


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a program's tile, and its warps."""

    block_rows: int
    block_d: int
    warps: int = 4


def tile(d: int, backward: bool = False) -> Tile:
    """The tile for rows of d_ff = d."""
    elements = BACKWARD_ELEMENTS if backward else FORWARD_ELEMENTS
    block_d = min(max(1 << max(d - 1, 0).bit_length(), 16), elements)
    return Tile(elements // block_d, block_d)
