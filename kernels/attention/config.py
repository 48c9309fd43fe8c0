"""Tile sizes as pure functions of the machine, the dtype and the head widths: no search at run time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile, the warps that share it, and how many tiles are on their way."""

    block_m: int
    block_n: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Plan:
    """The tiles of the three kernels that multiply matrices."""

    forward: Tile
    keys: Tile
    queries: Tile


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def padded(width: int) -> int:
    """The width of a tile that holds rows of this width: a power of two, and at least what a product needs."""
    return max(next_power_of_two(width), 16)


def plan_for(target: str, itemsize: int, d_head: int, d_v: int) -> Plan:
    """The tiles for a target (``sm_80`` ...), an element size in bytes and the head widths."""
    if target == "interpreter":
        return Plan(Tile(16, 16, 1, 1), Tile(16, 16, 1, 1), Tile(16, 16, 1, 1))
    return Plan(Tile(64, 64, 4), Tile(64, 64, 4), Tile(64, 64, 4))
