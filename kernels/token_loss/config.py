"""Tile sizes as pure functions of shape and machine: no search at run time, no GPU needed.

Rows of existing logits. A thread holds 16 elements of the tile (two 16-byte loads of bf16, four of fp32). What bounds a
long row is not registers but the second-level cache: between the first and the second reading of a row, all rows in
flight must fit in it (50 MB; `L2_BUDGET` leaves room for what is being written). So the longer the row, the fewer
programs may share a multiprocessor: a row above `BIG_ROW` bytes takes 32 warps, whose registers let only one
program live on a multiprocessor, and 132 rows of 256 KB are 34 MB. Loads of the next tiles are issued ahead
(`stages`), since one program alone has nobody to hide its latency.

The fused linear loss. The forward's tile is that of a large matrix product; each program walks several tiles of
the vocabulary and carries the running statistics, so that its results are 4 numbers a row and not a tile. Programs that
run at the same time share `group` blocks of rows (which stay in cache) and stream the head's rows past them.

They follow from latency times bandwidth, from register counts and from what compiles without spills on every
target (`python -m kernels compile token_loss --thorough`). What they give on a GPU is not measured; `python -m kernels bench token_loss
--sweep` times their neighbours.
"""

from dataclasses import dataclass

WHOLE_LIMIT = 16_384  # the longest row that stays in registers between statistics and gradient
BIG_ROW = 96 * 1024  # bytes: from here on one program a multiprocessor keeps the rows in flight within the cache
L2_BUDGET = 40 << 20
CHUNK_BYTES = 128 << 20  # of the buffer that holds a strip of the logits' gradient in the fused backward
TOKENS = 256  # tokens a program of the terms' kernels


@dataclass(frozen=True)
class RowTile:
    """Rows and columns of one program's tile, its warps, and how many tiles are loaded ahead in a long row."""

    block_rows: int
    block_v: int
    warps: int
    stages: int = 1

    def covers(self, vocabulary: int) -> bool:
        """Whether a whole row fits in the tile."""
        return self.block_v >= vocabulary


@dataclass(frozen=True)
class LinearTile:
    """A tile of a matrix product: rows, columns, depth of one step, warps, steps loaded ahead, rows of tiles a group."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class LinearPlan:
    """The fused linear loss: three tiles, how many programs share the vocabulary, and the width of a backward strip."""

    forward: LinearTile
    gradient: LinearTile
    product: LinearTile
    splits: int
    chunk: int


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def lane_elements(itemsize: int) -> int:
    """Elements in the 16 bytes that a thread loads at once: each such lane of a tile carries statistics of its own."""
    return 16 // itemsize


def packed(vocabulary: int, itemsize: int) -> bool:
    """Whether rows start at multiples of 16 bytes: then a lane's elements lie side by side, else a tile's length / LANE apart.

    A vocabulary like 50,257 has to be read element by element. Neighbouring threads then take neighbouring elements, and each
    keeps to its own lane all the same.
    """
    return vocabulary * itemsize % 16 == 0


def row_tile(vocabulary: int, itemsize: int) -> RowTile:
    """The tile for rows of existing logits that are read once or twice."""
    if vocabulary <= 4_096:
        block_v = max(next_power_of_two(vocabulary), 16)
        return RowTile(max(2_048 // block_v, 1), block_v, 4 if block_v <= 2_048 else 8)
    if vocabulary * itemsize <= BIG_ROW or not packed(vocabulary, itemsize):
        return RowTile(1, 8_192, 16, 2)
    return RowTile(1, 16_384, 32, 2)


def loss_tile(vocabulary: int, itemsize: int) -> RowTile:
    """The tile for statistics and gradient in one launch: whole rows where registers hold them."""
    if vocabulary <= WHOLE_LIMIT:
        block_v = max(next_power_of_two(vocabulary), 16)
        return RowTile(max(2_048 // block_v, 1), block_v, min(max(block_v // 512, 4), 32))
    return row_tile(vocabulary, itemsize)


SQUARE, WIDE, NARROW = LinearTile(128, 128, 64, 8, 3), LinearTile(128, 256, 64, 8, 3), LinearTile(128, 64, 64, 4, 3)
EXACT = LinearTile(64, 64, 32, 4, 2)  # fp32, on the ordinary units
# A width whose rows do not start at multiples of 16 bytes is loaded element by element, through registers.
ODD, ODD_NARROW = LinearTile(128, 128, 32, 8, 2), LinearTile(128, 64, 32, 4, 2)


def linear_tiles(d: int, itemsize: int, target: str) -> tuple[LinearTile, LinearTile, LinearTile]:
    """Tiles of the forward, of the logits' gradient and of the two products, by what fits in registers and shared memory.

    The forward reduces its tile to four numbers a row, so Hopper's registers hold one of 256 columns (86 operations a byte loaded
    instead of 64); the gradient has a tile to store, and Blackwell keeps accumulators apart but spills the addresses of
    128 columns.
    """
    if itemsize == 4:
        return EXACT, EXACT, EXACT
    if d * itemsize % 16:
        return ODD, ODD_NARROW if target == "sm_100" else ODD, ODD
    return WIDE if target == "sm_90" else SQUARE, NARROW if target == "sm_100" else SQUARE, SQUARE


def linear_plan(
    n_rows: int, d: int, vocabulary: int, itemsize: int, multiprocessors: int, target: str = "sm_90"
) -> LinearPlan:
    """Tiles, splits of the vocabulary and the backward's strip; fixed by the arguments, so two runs agree."""
    forward, gradient, product = linear_tiles(d, itemsize, target)
    row_blocks, tiles = -(-n_rows // forward.block_m), -(-vocabulary // forward.block_n)
    waves = -(-row_blocks * tiles // (multiprocessors * 16)) or 1  # about 16 tiles a program when there are enough
    splits = min(max(multiprocessors * waves // row_blocks, 1), tiles)
    block = max(gradient.block_n, product.block_k)
    return LinearPlan(forward, gradient, product, splits, chunk_columns(n_rows, vocabulary, itemsize, block))


def chunk_columns(n_rows: int, vocabulary: int, itemsize: int, block: int) -> int:
    """Columns of the vocabulary in one strip of the backward: as many whole blocks as `CHUNK_BYTES` hold."""
    fit = CHUNK_BYTES // max(n_rows * itemsize, 1) // block * block
    return min(max(fit, block), -(-vocabulary // block) * block)
