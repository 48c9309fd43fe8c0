"""Tile sizes and program counts as pure functions of shape and machine: no search at run time, no GPU needed.

The rule behind the numbers: a thread holds about 16 elements of each tensor (two to four 16-byte loads in
flight), and in the backward an SM works on 8192 elements of each tensor at a time, which with one tile
prefetched keeps 32 to 64 KB on its way from memory. They follow from latency times bandwidth and from what
compiles without spills on every target (`python -m kernels compile norm --thorough`). What they give on a GPU is
measured by `python -m kernels bench norm`, and `--sweep` times their neighbours.
"""

from dataclasses import dataclass, replace

ELEMENTS_PER_THREAD = 16
FORWARD_LIMIT = 16_384  # the longest row kept in registers: longer ones spill
BACKWARD_LIMIT = 8_192
FORWARD_ROWS = 2_048  # short rows share a tile of this many elements
BACKWARD_ROWS = 1_024
ELEMENTS_PER_SM = 8_192
AHEAD_LIMIT = 16_384  # bytes of a tile that is loaded ahead: three tensors of it must fit AMD's shared memory


@dataclass(frozen=True)
class Tile:
    """Rows and columns of one program's tile, its warps, and how many tiles are loaded ahead."""

    block_rows: int
    block_d: int
    warps: int
    stages: int = 1

    def covers(self, d: int) -> bool:
        """Whether a whole row fits in the tile."""
        return self.block_d >= d


@dataclass(frozen=True)
class BackwardPlan:
    """The backward's tile and the number of programs, each of which keeps a share of the weights' gradients.

    For rows longer than the tile, ``means`` is the tile of the first kernel, ``tile`` is a strip of columns,
    and ``programs`` counts the walkers on each strip.
    """

    tile: Tile
    programs: int
    means: Tile | None = None


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _whole_rows(d: int, row_tile: int, per_thread: int) -> Tile:
    block_d = max(next_power_of_two(d), 16)
    block_rows = max(row_tile // block_d, 1)
    warps = block_rows * block_d // (32 * per_thread)
    return Tile(block_rows, block_d, min(max(warps, 4), 16))


def forward_tile(d: int) -> Tile:
    """The forward's tile for rows of length d."""
    return _whole_rows(d, FORWARD_ROWS, ELEMENTS_PER_THREAD) if d <= FORWARD_LIMIT else Tile(1, 8_192, 8)


def backward_plan(
    n_rows: int, d: int, itemsize: int, multiprocessors: int, *, centred: bool, residual: bool
) -> BackwardPlan:
    """The backward's tile and program count: fixed by the arguments, so two runs add in the same order.

    LayerNorm keeps two shares in registers, which leaves room for half as many elements a thread, and a residual
    branch loads a third tensor, which with two shares leaves room for half as long a row.
    """
    if d > BACKWARD_LIMIT // (2 if centred and residual else 1):
        strip = Tile(1, 1_024 if centred or residual else 2_048, 4, stages=2)
        walkers = multiprocessors * ELEMENTS_PER_SM // strip.block_d // -(-d // strip.block_d)
        return BackwardPlan(strip, max(min(walkers, n_rows), 1), means=Tile(1, 4_096, 8))
    tile = _whole_rows(d, BACKWARD_ROWS, ELEMENTS_PER_THREAD // (2 if centred else 1))
    tile_bytes = tile.block_rows * tile.block_d * itemsize
    deep = centred and residual and itemsize == 2  # where two stages happen to spill and three do not
    tile = replace(tile, stages=1 if tile_bytes > AHEAD_LIMIT else 3 if deep else 2)
    per_sm = max(ELEMENTS_PER_SM // (tile.block_rows * tile.block_d), 1)
    return BackwardPlan(tile, max(min(multiprocessors * per_sm, -(-n_rows // tile.block_rows)), 1))


SUM_TILE = Tile(64, 32, 4)  # shares x columns of the kernel that adds the shares up
