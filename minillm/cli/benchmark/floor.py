"""The floor: nothing but the matrix products of the step, forward and backward.

A product Y = X W of the forward pass comes with two of the same size in the backward pass. They run as the step
runs them, the rows shared by threads with one matrix-library thread each, on operands that stay the same.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from threadpoolctl import ThreadpoolController

from minillm.cli.benchmark.cases import Case


@contextmanager
def make_step(case: Case, threads: int) -> Iterator[Callable[[], float]]:
    """All matrix products of one training step."""
    rng = np.random.default_rng(0)
    work = [_operands(case, threads, rng) for _ in range(threads)]

    def one_share(products: list) -> None:
        for count, x, w, y in products:
            xt, wt = x.swapaxes(-1, -2), w.swapaxes(-1, -2)
            dx, dw = np.empty_like(x), np.empty_like(w)
            for _ in range(count):
                np.matmul(x, w, out=y)
                np.matmul(y, wt, out=dx)
                np.matmul(xt, y, out=dw)

    with ThreadPoolExecutor(threads) as pool, ThreadpoolController().limit(limits=1, user_api="blas"):

        def step() -> float:
            list(pool.map(one_share, work))
            return 0.0

        yield step


def _operands(case: Case, threads: int, rng: np.random.Generator) -> list:
    """Operands of one thread's share: projections share the rows, attention products come as a batch of heads."""
    products = []
    rows = case.batch * case.length
    for count, m, k, n in case.products():
        if m == rows:
            shapes, times = ((m // threads, k), (k, n)), count
        else:
            heads = count // (case.n_layers * threads)
            shapes, times = ((heads, m, k), (heads, k, n)), case.n_layers
        x, w = (rng.normal(size=s).astype(np.float32) for s in shapes)
        products.append((times, x, w, np.matmul(x, w)))
    return products
