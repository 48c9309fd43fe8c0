r"""One training step, its batch shared by threads.

Equation: `training-step` forward, loss, backward, clip, optimiser, schedule
Source: topics #8; notes §2.

NumPy's matrix product runs on several threads by itself, but nothing else does: norms, activations and softmax would
leave the other cores idle. So the batch is cut into shares of whole sequences, one per thread, and each thread runs
forward and backward of its share with a matrix library limited to one thread. Parameters are read by all and written
by none; every thread has its own tape, its own scratch buffers and its own gradients, which are added, always in the
order of the shares, when the optimiser reads them. The result does not depend on which thread finishes first.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
from threadpoolctl import ThreadpoolController

from minillm.autograd import Tensor
from minillm.autograd.tape import propagate
from minillm.checks import require_positive

LossFunction = Callable[..., Tensor]


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loss_and_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[float, list[np.ndarray]]:
    """The value of a loss and its gradient arrays, zeros for parameters that it does not reach."""
    found = propagate([loss], [np.ones(loss.shape, loss.dtype)], retain_graph=False, create_graph=False)
    gradients = [found[id(p)] if id(p) in found else np.zeros(p.shape, p.dtype) for p in parameters]
    return float(loss.data), gradients


class BatchThreads:
    r"""Threads that compute losses and gradients of shares of a batch.

    Equation: `thread-local-isolation` concurrent runs equal serial ones
    Equation: `grad-accumulation` shares weighted by their token counts, so that they add up to the whole batch
    Shapes: every array of the batch has the sequences on axis 0
    Source: notes §2; topics #8.

    Use as a context: it limits the matrix library to one thread inside and restores it afterwards.
    """

    def __init__(self, threads: int | None = None):
        threads = available_cores() if threads is None else threads
        require_positive(threads, "BatchThreads", "threads", integer=True)
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None

    @contextmanager
    def running(self) -> Iterator["BatchThreads"]:
        """Start the threads for a block of code."""
        if self.threads == 1:
            yield self
            return
        with ThreadPoolExecutor(self.threads - 1) as pool, ThreadpoolController().limit(limits=1, user_api="blas"):
            self._pool = pool
            try:
                yield self
            finally:
                self._pool = None

    def gradients(
        self, loss_of_share: LossFunction, parameters: Sequence[Tensor], *batch: np.ndarray
    ) -> tuple[float, list[list[np.ndarray]]]:
        """The summed loss and one list of gradient arrays per share.

        ``loss_of_share(*arrays)`` must divide by a count of the whole batch, not of its share, so that the shares
        of loss and gradient add up.
        """
        results = self.map(lambda *share: loss_and_gradients(loss_of_share(*share), parameters), *batch)
        return sum(loss for loss, _ in results), [gradients for _, gradients in results]

    def map(self, function: Callable, *batch: np.ndarray) -> list:
        """What a function returns for every thread's share of a batch, in the order of the shares."""
        shares = split_batch(batch, 1 if self._pool is None else self.threads)
        futures = [] if self._pool is None else [self._pool.submit(function, *share) for share in shares[1:]]
        return [function(*shares[0])] + [future.result() for future in futures]


def split_batch(batch: Sequence[np.ndarray], n: int) -> list[list[np.ndarray]]:
    """Cut every array of a batch into up to n runs of sequences of nearly equal count."""
    n = max(1, min(n, len(batch[0])))
    edges = np.linspace(0, len(batch[0]), n + 1).astype(int)
    return [[a[i:j] for a in batch] for i, j in pairwise(edges)]
