r"""Independent work in threads: slots that do not share a cache line, and a map over heads or experts.

NumPy releases the interpreter lock inside its loops and matrix products, so threads help where one call does much
work. Each call must then keep the matrix library to one thread, or the two fight for the cores.

The threads stay for the next call, and with them their scratch memory.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from minillm.checks import require, require_positive

CACHE_LINE = 64  # bytes
Result = TypeVar("Result")


class PaddedSlots:
    r"""One array for each thread, every one on cache lines of its own.

    Two threads that write to one cache line, though to different bytes, take it from each other with every write.

    Equation: `false-sharing-padding` a slot every $64\lceil n/64\rceil$ bytes, the first at a multiple of 64
    Shapes: n_slots arrays of ``shape``
    Raises: ValueError unless there is at least one slot, IndexError for one that does not exist.
    Source: notes §2.
    """

    def __init__(self, n_slots: int, shape: tuple[int, ...], dtype: Any = np.float32):
        require_positive(n_slots, "PaddedSlots", "n_slots", integer=True)
        self.shape, self.dtype, self.n_slots = tuple(shape), np.dtype(dtype), n_slots
        self.used = prod(self.shape) * self.dtype.itemsize
        self.stride = CACHE_LINE * max(1, -(-self.used // CACHE_LINE))  # bytes from slot to slot
        memory = np.zeros(n_slots * self.stride + CACHE_LINE, np.uint8)
        start = -memory.ctypes.data % CACHE_LINE
        self._memory = memory[start : start + n_slots * self.stride]

    def __len__(self) -> int:
        return self.n_slots

    def __getitem__(self, index: int) -> np.ndarray:
        """The array of one thread, a view."""
        inside = 0 <= index < self.n_slots
        require(inside, "PaddedSlots", "the slot", f"in [0, {self.n_slots})", index, error=IndexError)
        part = self._memory[index * self.stride : index * self.stride + self.used]
        return part.view(self.dtype).reshape(self.shape)

    def sum(self) -> np.ndarray:
        """The slots added up, always in the same order."""
        total = np.zeros(self.shape, self.dtype)
        for index in range(self.n_slots):
            total += self[index]
        return total


def parallel_map(function: Callable[..., Result], *arguments: Any, threads: int) -> list[Result]:
    r"""What a function returns for each of several independent pieces of work, in their order.

    Equation: `parallel-heads` $\mathbf O_h=f(\mathbf Q_h,\mathbf K_h,\mathbf V_h)$ for all heads (or experts) at once; equal to one after another
    Equation: `thread-local-isolation` a thread's scratch memory is its own
    Shapes: sequences of equal length n -> n results; a piece that maps in its turn does so in its own thread
    Raises: ValueError for sequences of unequal length or a number of threads that is not positive; whatever a piece of
        work raises.
    Source: notes §2, §8.8.
    """
    require_positive(threads, "parallel_map", "threads", integer=True)
    lengths = {len(argument) for argument in arguments}
    require(len(lengths) == 1, "parallel_map", "the arguments", "sequences of one length", f"lengths {sorted(lengths)}")
    if threads == 1 or lengths <= {0, 1} or _inside.a_piece:
        return [function(*piece) for piece in zip(*arguments, strict=True)]
    with _libraries().limit(limits=1, user_api="blas"):
        return list(_pool(threads).map(function, *arguments))


def library_threads() -> int:
    """How many threads the matrix library would use now: what this thread may use for itself instead."""
    if _inside.a_piece:
        return 1
    return max(
        (library.num_threads for library in _libraries().lib_controllers if library.user_api == "blas"), default=1
    )


class _Inside(threading.local):
    a_piece = False


_inside = _Inside()


def _enter() -> None:
    _inside.a_piece = True


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "parallel_map", initializer=_enter)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
