"""Tiles and segments as pure functions of shape and machine: no search at run time, no GPU needed.

A program holds the state of one head in registers, at most STATE numbers of it (as many as leave room for the tiles of a
chunk without spilling); wider values are cut into blocks of columns. A chunk of C tokens costs $C^2(d_\\phi+d_v)$ inside
and $2Cd_\\phi d_v$ with the state, so C near the width of a head balances the two, and 64 fills Hopper's wide
instructions. Segments exist only to fill the machine: as many as bring the programs up to PER_MULTIPROCESSOR on every
multiprocessor, and no more, for a second segment means reading k and v once more.
"""

from dataclasses import dataclass
from functools import lru_cache

STATE = 16_384
PER_MULTIPROCESSOR = 2
WIDEST = 256


@dataclass(frozen=True)
class Plan:
    """Tokens of a chunk, chunks of a segment, columns of values at a time, warps, chunks under way."""

    chunk: int
    per_segment: int
    block_v: int
    warps: int
    stages: int = 1


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def padded(width: int) -> int:
    """The width of a tile for so many columns: a power of two, at least what a product needs."""
    return max(next_power_of_two(width), 16)


@lru_cache(maxsize=4096)
def plan_for(heads: int, L: int, d_phi: int, d_v: int, itemsize: int, multiprocessors: int) -> Plan:
    """The plan for ``heads`` = B H heads of L tokens."""
    block_v = min(padded(d_v), STATE // padded(d_phi), 128)
    chunk = 64 if itemsize == 2 else 32
    chunks = max(-(-L // chunk), 1)
    wanted = -(-multiprocessors * PER_MULTIPROCESSOR // max(heads * -(-d_v // block_v), 1))
    per_segment = -(-chunks // min(wanted, chunks))
    warps = 8 if padded(d_phi) * block_v > 8192 or itemsize == 4 else 4
    return Plan(chunk, per_segment, block_v, warps)
