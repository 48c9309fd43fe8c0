"""Tile sizes as pure functions of the machine, the dtype and the head widths: no search at run time, no GPU needed.

What decides them, as long as no GPU has said otherwise (`python -m kernels compile attention` shows all of it):

- Nothing may spill, under any mask. An accumulator of fp32 costs BLOCK_M x width / threads registers a thread, and
  dK and dV together twice BLOCK_N x width / threads, which is why the pass for keys takes few queries at a time.
- Hopper multiplies 64 rows by up to 256 columns a group of four warps: eight warps on 128 rows make one instruction of
  each product and step of 16, and with few columns the reading of shared memory, not the multiplying, is the limit.
- Two tiles of K and V on their way (``stages``) fit 227 KB on Hopper and Blackwell at every width, 163 KB on Ampere.
  AMD has 64 KB and loads through registers: one stage, smaller tiles.
- fp32 is multiplied exactly, without tensor cores, so its tiles are small; it is there for checking, not for speed.

The three tables were made by compiling neighbours and taking the largest tile without a spill in every variant;
`python -m kernels bench attention --sweep` times the neighbours on a GPU.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile, the warps that share it, and how many tiles are on their way."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Plan:
    """The tiles of the three kernels that multiply matrices: the forward, the pass for dK and dV, the pass for dQ."""

    forward: Tile
    keys: Tile
    queries: Tile


CLASSES = (64, 128, 256)  # the wider of the two head widths, padded: the smallest class that holds it
SHORT = {  # 16-bit elements
    "sm_90": (
        Plan(Tile(128, 128, 8, 3), Tile(64, 128, 8), Tile(128, 64, 8, 3)),
        Plan(Tile(128, 128, 8), Tile(32, 128, 8), Tile(128, 64, 8)),
        Plan(Tile(128, 32, 8, 3), Tile(32, 32, 8), Tile(64, 32, 8)),
    ),
    "sm_100": (
        Plan(Tile(128, 128, 8, 2), Tile(64, 64, 8), Tile(128, 64, 8)),
        Plan(Tile(128, 64, 8), Tile(64, 64, 8, 1), Tile(128, 64, 8)),
        Plan(Tile(128, 32, 8), Tile(32, 32, 8), Tile(64, 32, 8)),
    ),
    "sm_80": (
        Plan(Tile(128, 64, 8, 3), Tile(32, 128, 8), Tile(128, 64, 8)),
        Plan(Tile(128, 64, 8), Tile(64, 64, 8), Tile(64, 64, 8)),
        Plan(Tile(64, 32, 8), Tile(32, 32, 8), Tile(32, 32, 4)),
    ),
    "gfx942": (
        Plan(Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1)),
        Plan(Tile(128, 32, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1)),
        Plan(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    ),
}
LONG = (  # fp32; with few warps on AMD, whose warps are twice as wide, and for dQ on Ampere
    Plan(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)),
    Plan(Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    Plan(Tile(16, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
)
INTERPRETER = Plan(Tile(16, 16, 1, 1), Tile(16, 16, 1, 1), Tile(16, 16, 1, 1))  # so that short texts cross blocks


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def padded(width: int) -> int:
    """The width of a tile that holds rows of this width: a power of two, and at least what a product needs."""
    return max(next_power_of_two(width), 16)


def table_of(target: str) -> str:
    """Which table serves a target: its own, or Ampere's, whose tiles fit the 99 KB of smaller GPUs as well."""
    return target if target in SHORT else "sm_80"


def plan_for(target: str, itemsize: int, d_head: int, d_v: int) -> Plan:
    """The tiles for a target (``sm_80`` ..., or ``interpreter``), an element size in bytes and the head widths."""
    if target == "interpreter":
        return INTERPRETER
    width = max(padded(d_head), padded(d_v))
    kind = next(n for n, limit in enumerate(CLASSES) if width <= limit)
    if itemsize == 4:
        plan = LONG[kind]
        if target == "gfx942":
            return Plan(_four(plan.forward), _four(plan.keys), _four(plan.queries))
        return replace(plan, queries=_four(plan.queries)) if table_of(target) == "sm_80" else plan
    plan = SHORT[table_of(target)][kind]
    ragged = padded(d_head) != d_head or padded(d_v) != d_v
    return _narrower(plan) if ragged else plan


def _narrower(plan: Plan) -> Plan:
    """For widths that do not fill their tile: masks on the columns take registers, too."""
    forward = replace(plan.forward, block_n=min(plan.forward.block_n, 64))
    return replace(plan, forward=forward, keys=replace(plan.keys, block_m=min(plan.keys.block_m, 32)))


def _four(tile: Tile) -> Tile:
    """At most four warps."""
    return replace(tile, warps=min(tile.warps, 4))
