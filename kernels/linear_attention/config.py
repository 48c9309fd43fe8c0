r"""Tiles and segments as pure functions of shape and machine: no search at run time, no GPU needed.

A program holds the state of one head in registers, $d_\phi$ rows and as many columns of the values as fit; wider values are
cut into blocks of columns. A chunk of C tokens costs $C^2(d_\phi+d_v)$ inside and $2Cd_\phi d_v$ with the state, so C near
the width of a head balances the two, and 64 fills Hopper's wide instructions. The sizes are the largest that compile
without spilling (`python -m kernels compile linear_attention`): Hopper's products take one factor from shared memory,
which leaves room for twice the chunk of the other targets; products of fp32 are made of plain multiply-adds and hold
their factors in registers many times over. Segments exist only to fill the machine: as many as bring the programs up to
PER_MULTIPROCESSOR on every multiprocessor, and no more, for a second segment means reading k and v once more.
"""

from dataclasses import dataclass
from functools import lru_cache

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
def plan_for(
    heads: int, L: int, d_phi: int, d_v: int, itemsize: int, multiprocessors: int, machine: str = "hopper"
) -> Plan:
    """The plan for ``heads`` = B H heads of L tokens, on a ``machine`` that is hopper, blackwell or other."""
    chunk, block_v, warps = _sizes(padded(d_phi), itemsize, machine)
    block_v = min(block_v, padded(d_v))
    chunks = max(-(-L // chunk), 1)
    wanted = -(-multiprocessors * PER_MULTIPROCESSOR // max(heads * -(-d_v // block_v), 1))
    return Plan(chunk, -(-chunks // min(wanted, chunks)), block_v, warps)


def _sizes(phi: int, itemsize: int, machine: str) -> tuple[int, int, int]:
    """Tokens of a chunk, columns of the values, warps."""
    if itemsize == 4:
        return 16, 16, 8
    if machine == "other":
        return (32, 32, 4) if phi <= 64 else (16, 32, 8) if phi == 128 else (16, 16, 8)
    if phi <= 64:
        return (64, 64, 8) if machine == "hopper" else (32, 64, 8)
    return (32, 64, 8) if phi == 128 else (16, 32, 8)
