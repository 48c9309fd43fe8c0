"""Tile sizes as pure functions of shape, dtype and architecture: no search at run time, no GPU needed.

The reasons, all of them visible in what the compiler reports (`python -m kernels compile experts`):

- 16-bit products on Hopper and Blackwell: 128 rows, 64 numbers deep, which is one 128-byte line a row. `down` has 256
  columns, eight warps and 128 sums a thread; `up` has two accumulators of 128 columns, for value and gate, and on
  Hopper sixteen warps: with eight, the sums are the same 128, but its epilogue keeps 22 to 32 of them on the stack. Both
  do 128 x 256 x 2 / (128 + 256) = 171 operations for every element that they load, 85 a byte. Four stages of 48 KB
  would fill shared memory to the last byte; three leave room, and hide the same latency.
- The derivative of the SwiGLU is no epilogue: U, H and three results beside an accumulator spill by the kilobyte.
- Ampere: 128 x 128 in 49 KB; the two accumulators of 64 columns twice as deep, where they need 128 registers exactly.
- AMD has 64 KB of shared memory a workgroup.
- float32 is for checking, not for speed: products without tensor cores, small tiles.
- 64 rows a tile where an expert has few: a half-empty tile costs as much as a full one. Fewer than 64 rows are no
  matrix product of a warp group.
"""

from dataclasses import dataclass

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of one program's tile, its warps, how many steps are loaded ahead, and row tiles a group."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class Plan:
    """One tile for every product of a layer. `up` and `down` share the height of a tile, hence the list of tiles."""

    up: Tile
    down: Tile
    weights: Tile

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return self.down.block_m


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


FEW_ROWS = 256  # below this mean load tiles of 64 rows waste less than tiles of 128 gain


def plan(n_rows: int, n_experts: int, itemsize: int, target: str) -> Plan:
    """The tiles for n_rows assignments over n_experts experts."""
    if itemsize == 4:
        return Plan(Tile(64, 32, 32, 8, 2), Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 8, 2))
    tall = n_rows >= FEW_ROWS * max(n_experts, 1)
    m, warps = (128, 8) if tall else (64, 4)
    if target == "gfx942":
        return Plan(Tile(m, 64, 32, 4, 2), Tile(m, 128, 32, 4, 2), Tile(128, 128, 32, 8, 2))
    if target == "sm_80":
        return Plan(Tile(m, 64, 64, warps, 3), Tile(m, 128, 32, warps, 4), Tile(128, 128, 32, 8, 4))
    pairs = 2 * warps if target == "sm_90" else warps  # of accumulators: on Blackwell they are not in registers
    return Plan(Tile(m, 128, 64, pairs, 3), Tile(m, 256, 64, warps, 3), Tile(128, 128, 64, 8, 3))


@dataclass(frozen=True)
class RouteTile:
    """Tokens a tile and warps of the router's kernels; a row of experts is never split."""

    block_t: int
    warps: int


ROUTE_ELEMENTS = 2048  # of a tile of tokens times experts, padded to a power of two


def route_tile(n_experts: int) -> RouteTile:
    """The router's tile: 16 logits a thread."""
    block_e = max(next_power_of_two(n_experts), 16)
    block_t = min(max(ROUTE_ELEMENTS // block_e, 1), 32)
    return RouteTile(block_t, min(max(block_t * block_e // 512, 4), 16))


def route_programs(n_tokens: int, tile: RouteTile, multiprocessors: int) -> int:
    """How many programs walk the tokens: each leaves one share, which one program adds up."""
    return max(min(-(-n_tokens // tile.block_t), 4 * multiprocessors), 1)


@dataclass(frozen=True)
class PackTile:
    """Assignments a tile and a chunk, chunks a tile of the scan, and warps."""

    block_a: int
    chunk: int
    block_c: int
    warps: int = 4


CHUNKS = 512  # at most: one program scans them
PACK_ELEMENTS = 4096


def pack_tile(n_assignments: int, n_experts: int) -> PackTile:
    """Chunks of at least one tile, and not more of them than one program scans in a few steps."""
    block_e = max(next_power_of_two(n_experts), 16)
    block_a = min(max(PACK_ELEMENTS // block_e, 16), 256)
    chunk = block_a * max(-(-n_assignments // (block_a * CHUNKS)), 1)
    return PackTile(block_a, chunk, min(max(PACK_ELEMENTS // block_e, 1), 64), 8 if block_e > 256 else 4)


ROW_ELEMENTS = 2048  # 16 a thread


@dataclass(frozen=True)
class RowTile:
    """Tokens and columns of a tile of the row-wise kernels, and warps."""

    block_t: int
    block_d: int
    warps: int


def row_tile(d: int) -> RowTile:
    """Whole rows where they are short, strips where they are long."""
    block_d = min(max(next_power_of_two(d), 16), ROW_ELEMENTS)
    return RowTile(max(ROW_ELEMENTS // 2 // block_d, 1), block_d, 4)
