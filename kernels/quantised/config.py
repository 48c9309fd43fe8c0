"""Tile sizes as a pure function of the rows, the type and the direction: no search at run time.

Up to 16 rows the weights' bytes are the bound, and there is one tile of rows: narrow strips of the output make many
programs (4096 outputs in strips of 16 are 256, two for every multiprocessor of an H200), and a loop round asks for 64
weights of each row, which is one block of NF4 with one scale. More rows are products: 128 rows by 64 outputs make
every dequantised weight serve 128 rows, which hides what looking up its level costs, and eight warps have the
registers for it (four spill where nothing is aligned). float32 operands are not multiplied on tensor cores and take
smaller tiles.
"""

from dataclasses import dataclass

FEW_ROWS = 16
BLOCK_REDUCED = 64


@dataclass(frozen=True)
class Tile:
    """Rows of x, outputs, and the length of a loop round; warps and stages of its loads."""

    rows: int
    out: int
    reduced: int
    warps: int = 4
    stages: int = 1


def tile(n_rows: int, itemsize: int) -> Tile:
    """The tile for x of n_rows rows of itemsize bytes a number, in both directions."""
    if n_rows <= FEW_ROWS:
        return Tile(16, 16, BLOCK_REDUCED // 2 if itemsize == 4 else BLOCK_REDUCED, 2, 2)
    return Tile(32, 32, BLOCK_REDUCED // 2, 4, 2) if itemsize == 4 else Tile(128, 64, BLOCK_REDUCED, 8, 2)
