"""Tiles, splits and widths as pure functions of shape and machine: no search at run time, no GPU needed.

The rule behind the numbers. A step moves a few KB for each key and hardly computes, so what counts is how many
bytes are on their way. At 4.3 TB/s and a latency of about 0.8 microseconds an H200 needs 26 KB in flight on each of its
132 multiprocessors; a program asks for TILE_BYTES ahead of use (two tiles on their way), and two programs fit a
multiprocessor, so there is twice that. Rows are padded to 16, the least that a tensor core takes: the product of a
16-row tile uses a tenth of the time in which its keys arrive. Wide rows (MLA: 128 heads over one latent) come in
blocks of 64, where Hopper's wide instructions begin.

How many splits: the programs of all heads fill the machine in *waves*; a wave takes as long as its stretch of keys, and
about one tile more to start; parts have to be merged, which costs a launch, two tiles' time, and a little for each. The
sum is minimised by trying every number. Lengths live on the GPU and asking would stop it, so the capacity (or a
``max_length`` that the caller knows) decides; each sequence then cuts *its own* keys into that many stretches.
"""

from dataclasses import dataclass
from functools import lru_cache

MIN_ROWS = 16
MAX_ROWS = 64
TILE_BYTES = 32_768  # keys and values of one tile
AMD_TILE_BYTES = 16_384  # larger ones spill scalar registers there
PER_MULTIPROCESSOR = 2
START_TILES = 1.0
MERGE_TILES = 2.0
MAX_SPLITS = 512


@dataclass(frozen=True)
class Widths:
    """How the columns of a key are cut: ``main`` of them in a tile of ``block``, the others in a tile of ``rest``."""

    main: int
    block: int
    rest: int
    block_v: int


@dataclass(frozen=True)
class Plan:
    """Rows and keys of a tile, the stretches that keys are cut into, warps, and tiles on their way."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int = 3
    block_parts: int = 16


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def padded(width: int) -> int:
    """The width of a tile for so many columns: a power of two, at least what a product needs."""
    return max(next_power_of_two(width), 16)


def widths(d: int, d_v: int, latent: bool = False) -> Widths:
    """The tiles for keys of d columns and values of d_v; with ``latent`` the first d_v columns are the value."""
    if latent:
        return Widths(d_v, padded(d_v), padded(d - d_v) if d > d_v else 0, padded(d_v))
    below = padded(d) // 2
    if d == below or below < 16 or below + padded(d - below) >= padded(d):
        return Widths(d, padded(d), 0, padded(d_v))
    return Widths(below, below, padded(d - below), padded(d_v))


@lru_cache(maxsize=4096)
def plan_for(
    heads: int, rows: int, keys: int, d: int, d_v: int, itemsize: int, multiprocessors: int,
    latent: bool = False, paged: bool = False, amd: bool = False,
) -> Plan:  # fmt: skip
    """The plan for ``heads`` = B H_kv key/value heads, ``rows`` = group L_q queries on each, and at most so many keys.

    A paged cache needs one more tile under way, for the table has to arrive before the page is asked for. AMD's 64 KB
    of shared memory hold no third tile of keys.
    """
    w = widths(d, d_v, latent)
    block_m = min(max(next_power_of_two(rows), MIN_ROWS), MAX_ROWS)
    columns = w.block + w.rest + (0 if latent else w.block_v)
    block_n = min(max((AMD_TILE_BYTES if amd else TILE_BYTES) // (columns * itemsize), 16), 128)
    block_n = 1 << (block_n.bit_length() - 1)
    programs = heads * -(-rows // block_m)
    splits = choose_splits(programs, -(-keys // block_n), multiprocessors)
    warps = 4 if block_m * w.block_v <= 8192 and itemsize == 2 else 8
    return Plan(block_m, block_n, splits, warps, 2 if amd else 5 if paged else 3)


def choose_splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """Into how many stretches to cut ``tiles`` tiles of keys, for so many programs: the cheapest, and of those the fewest."""
    room = multiprocessors * PER_MULTIPROCESSOR

    def cost(splits: int) -> float:
        waves = -(-programs * splits // room)
        return waves * (-(-tiles // splits) + START_TILES) + (MERGE_TILES + splits / 64 if splits > 1 else 0.0)

    return min(range(1, min(max(tiles, 1), MAX_SPLITS) + 1), key=cost)
