r"""Dropout and DropPath as modules: a generator switches them on, its absence is evaluation."""

import numpy as np

from minillm.autograd import Tensor
from minillm.functional.dropout import draw_kept, dropout, droppath
from minillm.functional.multi_head import check_rate
from minillm.nn.module import Module


class Dropout(Module):
    r"""Forget single entries in training.

    Equation: `dropout` $\hat{\mathbf X}=\frac1q\mathbf X\odot\mathbf R,\ q=1-p$; the identity in evaluation
    Shapes: (...) -> (...)
    Raises: ValueError for a rate outside [0, 1).
    Source: notes §4.8.
    """

    def __init__(self, rate: float):
        check_rate("Dropout", rate)
        self.rate = rate

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Train with a generator, evaluate without one."""
        if rng is None or self.rate == 0:
            return x
        return dropout(x, draw_kept(x.shape, self.rate, rng), self.rate)


class DropPath(Module):
    r"""Add a branch to the stream, leaving it out for some sequences in training.

    Equation: `droppath` $\mathbf x'=\mathbf x+\frac bqF(\mathbf x),\ b\sim\mathrm{Bernoulli}(q)$ per sample
    Shapes: x, branch (B, ...) -> (B, ...)
    Raises: ValueError for a rate outside [0, 1), or a branch of another shape.
    Source: notes §8.9.
    """

    def __init__(self, rate: float):
        check_rate("DropPath", rate)
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """Train with a generator, evaluate without one."""
        kept = None if rng is None or self.rate == 0 else draw_kept(x.shape[:1], self.rate, rng)
        return droppath(x, branch, kept, self.rate)
