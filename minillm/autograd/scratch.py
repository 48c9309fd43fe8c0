r"""Scratch buffers: memory that a thread uses again instead of asking the system for fresh pages.

Equation: `scratch-buffer` one reusable arena per thread; no allocation after warm-up, results unchanged.
Equation: `thread-local-isolation` each thread has its own arena, so that concurrent runs equal serial ones.
Source: notes §2.

The fused forms write their large results and temporaries into arrays from `empty`. A training step asks for
the same sizes again and again; without an arena every request for some megabytes is answered with pages that
the system must first clear and map, which costs as much as computing what goes into them.

How a buffer comes back needs no bookkeeping by its users. An array handed out is a view of a block that
the arena owns, and every view of that view refers to the block too. When nobody but the arena refers to a
block any more, its reference count says so, and it is free. So a result that somebody still holds, a loss
curve or a saved activation, is never overwritten.
"""

import sys
import threading
from math import prod

import numpy as np

SMALLEST = 1 << 14  # bytes; below, the ordinary allocator is as fast
# Reference counts tell the truth under CPython with its lock; elsewhere every request is a fresh array.
COUNTS_ARE_EXACT = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()


class Arena:
    """The blocks of one thread, kept by size."""

    def __init__(self) -> None:
        self.blocks: dict[int, list[np.ndarray]] = {}
        self.peak = 0  # bytes, the most that was in use at once

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An uninitialised array in a block that nobody refers to, new only if there is none."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < SMALLEST or not COUNTS_ARE_EXACT:
            return np.empty(shape, dtype)
        blocks = self.blocks.get(nbytes, ())
        for i in range(len(blocks)):
            if sys.getrefcount(blocks[i]) == _UNUSED:
                return blocks[i].view(dtype).reshape(shape)
        self._make_room(nbytes)
        block = np.empty(nbytes, np.uint8)
        self.blocks.setdefault(nbytes, []).append(block)
        return block.view(dtype).reshape(shape)

    def _make_room(self, nbytes: int) -> None:
        """Before a new block: give unused ones back, the longest-known sizes first, if too much is held.

        Too much is more than twice what was ever in use at once. A step that repeats never gets there; batches
        whose lengths change would otherwise leave behind the buffers of every length there ever was.
        """
        used = {size: [sys.getrefcount(b[i]) != _UNUSED for i in range(len(b))] for size, b in self.blocks.items()}
        in_use = sum(size * sum(flags) for size, flags in used.items())
        self.peak = max(self.peak, in_use + nbytes)
        excess = self.nbytes + nbytes - 2 * self.peak
        for size, flags in used.items():
            for i in reversed(range(len(flags))):
                if excess > 0 and not flags[i]:
                    del self.blocks[size][i]
                    excess -= size
            if not self.blocks[size]:
                del self.blocks[size]

    @property
    def nbytes(self) -> int:
        """The memory held, in bytes."""
        return sum(size * len(blocks) for size, blocks in self.blocks.items())

    def clear(self) -> None:
        """Forget all blocks; those in use live on with their users."""
        self.blocks.clear()


def _count_when_unused() -> int:
    """What `sys.getrefcount` says of a list element that nothing else refers to, in this interpreter."""
    blocks = [np.empty(1, np.uint8)]
    for i in range(1):
        return sys.getrefcount(blocks[i])
    raise AssertionError


_UNUSED = _count_when_unused()


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.arena = Arena()


_threads = _PerThread()


def arena() -> Arena:
    """The calling thread's arena."""
    return _threads.arena


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array from the calling thread's arena.

    Equation: `scratch-buffer` one reusable arena per thread
    Shapes: as asked.
    Source: notes §2.
    """
    return _threads.arena.empty(shape, dtype)


def empty_like(array: np.ndarray) -> np.ndarray:
    """An uninitialised C-contiguous array of the same shape and dtype from the thread's arena."""
    return _threads.arena.empty(array.shape, array.dtype)
