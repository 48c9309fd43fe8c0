r"""The family ``threads``: what two figures of working in threads come to on this machine.

``slots``: every thread adds rows into a slot of three numbers, again and again. Ours keeps the slots on cache lines of
their own, the other side packs them into one line, which the cores then take from each other at every write.
``heads``: the attention of eight heads, shared by threads or one head after another.

Equation: `false-sharing-padding` a slot every $64\lceil n/64\rceil$ bytes beside slots that touch
Equation: `parallel-heads` all heads at once beside one after another
Source: notes §2.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from minillm.autograd.parallel import PaddedSlots, parallel_map
from minillm.cli.benchmark.families import Family

ROWS, WIDTH = 400_000, 3
H, L, D_HEAD = 8, 512, 64


@dataclass(frozen=True)
class ThreadsCase:
    """Slots or heads, and how many steps one turn times."""

    name: str
    steps: int = 5


CASES = {name: ThreadsCase(name) for name in ("slots", "heads")}


def slot_step(padded: bool, threads: int) -> Callable[[], float]:
    """Sums of rows, each thread's kept in its slot; the reduction writes there for every row."""
    rows = np.random.default_rng(0).normal(size=(threads, ROWS, WIDTH))
    padded_slots = PaddedSlots(threads, (WIDTH,), np.float64)
    slots: list[np.ndarray] = (
        [padded_slots[i] for i in range(threads)] if padded else list(PaddedSlots(1, (threads, WIDTH), np.float64)[0])
    )

    def step() -> float:
        parallel_map(lambda x, slot: np.add.reduce(x, axis=0, out=slot), rows, slots, threads=threads)
        return float(sum(slot.sum() for slot in slots))

    return step


def head_step(threads: int) -> Callable[[], float]:
    """Attention head by head."""
    q, k, v = np.random.default_rng(0).normal(size=(3, H, L, D_HEAD)).astype(np.float32)

    def head(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        s = q @ k.T * np.float32(D_HEAD**-0.5)
        p = np.exp(s - s.max(-1, keepdims=True))
        return p @ v / p.sum(-1, keepdims=True)

    return lambda: float(parallel_map(head, q, k, v, threads=threads)[-1][0, 0])


@contextmanager
def ours(case: ThreadsCase, threads: int) -> Iterator[Callable[[], float]]:
    """Padded slots; heads in threads."""
    with threadpool_limits(1, user_api="blas"):
        yield slot_step(True, threads) if case.name == "slots" else head_step(threads)


@contextmanager
def plain(case: ThreadsCase, threads: int) -> Iterator[Callable[[], float]]:
    """Packed slots; one head after another."""
    with threadpool_limits(1, user_api="blas"):
        yield slot_step(False, threads) if case.name == "slots" else head_step(1)


SIDES = {"ours": ours, "plain": plain}
ABOUT = "slots padded against false sharing, heads in threads"
FAMILY = Family("threads", ABOUT, CASES, SIDES, peer="packed, one by one", peer_side="plain", same_answer=True)
