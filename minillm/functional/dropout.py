r"""Forgetting at random, in training only: entries (dropout) or whole branches (DropPath)."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require
from minillm.functional.multi_head import check_rate


def draw_kept(shape: tuple[int, ...], rate: float, rng: np.random.Generator) -> Bool[np.ndarray, "..."]:
    r"""What survives: each entry with probability 1 - rate.

    Equation: `dropout` $\mathbf R\sim\mathrm{Bernoulli}(q),\ q=1-p$
    Shapes: -> shape
    Raises: ValueError for a rate outside [0, 1).
    Source: notes §4.8.
    """
    check_rate("draw_kept", rate)
    return rng.random(shape) >= rate


def _example(rng):
    shape = [(2, 3), (4,), (1, 2, 2)][rng.integers(3)]
    return (rng.normal(size=shape),), {"kept": rng.random(shape) < 0.6, "rate": 0.4}


@written("dropout", example=_example)
def dropout(x: Float[Tensor, "..."], kept: Bool[np.ndarray, "..."] | None, rate: float) -> Float[Tensor, "..."]:
    r"""Set some entries to 0 and enlarge the others, so that the mean stays.

    Equation: `dropout` $\hat{\mathbf X}=\frac1q\mathbf X\odot\mathbf R,\ q=1-p$; the identity in evaluation
    Shapes: x (...), kept like x or None to evaluate -> (...)
    Raises: ValueError for a rate outside [0, 1), or a mask of another shape.
    Source: notes §4.8; Srivastava et al. 2014.
    """
    check_rate("dropout", rate)
    if kept is None:
        return x
    fits = kept.dtype == bool and kept.shape == x.shape
    require(fits, "dropout", "the mask", f"boolean of shape {x.shape}", kept)
    return x * (kept * (1.0 / (1.0 - rate)))


def _example_path(rng):
    kept = rng.random(3) < 0.6
    return (rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 2, 4))), {"kept": kept, "rate": 0.4}


@written("droppath", example=_example_path)
def droppath(
    x: Float[Tensor, "B *rest"], branch: Float[Tensor, "B *rest"], kept: Bool[np.ndarray, " B"] | None, rate: float
) -> Float[Tensor, "B *rest"]:
    r"""Leave a whole branch out for some sequences of the batch.

    Equation: `droppath` $\mathbf x'=\mathbf x+\frac bqF(\mathbf x),\ b\sim\mathrm{Bernoulli}(q)$ per sample; $\mathbf x+F(\mathbf x)$ in evaluation
    Shapes: x, branch (B, ...), kept (B,) or None to evaluate -> (B, ...)
    Raises: ValueError for a rate outside [0, 1), branches of another shape, or a mask that is not (B,).
    Source: notes §8.9; Huang et al. 2016.
    """
    check_rate("droppath", rate)
    require(branch.shape == x.shape, "droppath", "the branch", f"of shape {x.shape}, as the stream", branch)
    if kept is None:
        return x + branch
    fits = kept.dtype == bool and kept.shape == x.shape[:1]
    require(fits, "droppath", "the mask", f"boolean of shape {x.shape[:1]}", kept)
    factor: Any = kept.reshape(-1, *(1,) * (x.ndim - 1)) * (1.0 / (1.0 - rate))
    return x + branch * factor
