r"""Norms over the batch and over groups of channels, as written, with the running statistics that inference needs.

All of them are $\hat x=g\,(x-\mu)/\sqrt{s^2+\varepsilon_0}+b$; they differ in what the mean and the variance run over.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_positive


def _normalise(X: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Mean 0 and variance 1 over some axes."""
    centred = X - X.mean(axes, keepdims=True)
    return centred / ((centred * centred).mean(axes, keepdims=True) + eps).sqrt()


def _check(where: str, X, g, b, ndim: int, shape: str) -> None:
    require(X.ndim == ndim, where, "X", f"of shape {shape}", X)
    for name, array in (("g", g), ("b", b)):
        require(array.shape == (X.shape[1],), where, name, f"of shape ({X.shape[1]},), one for each channel", array)


def _affine(X: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """A gain and a shift for each channel, axis 1."""
    shape = (1, -1, *(1,) * (X.ndim - 2))
    return X * g.reshape(shape) + b.reshape(shape)


@written("batch_norm_1d", example=lambda rng: ((rng.normal(size=(5, 3)), rng.normal(size=3), rng.normal(size=3)), {}))
def batch_norm_1d(
    X: Float[Tensor, "B d"], g: Float[Tensor, " d"], b: Float[Tensor, " d"], eps: float = 1e-5
) -> Float[Tensor, "B d"]:
    r"""Normalise every feature over the batch.

    Equation: `batchnorm-1d` $\mu_j=\frac1B\sum_iX_{ij},\ s_j^2=\frac1B\sum_i(X_{ij}-\mu_j)^2,\ \hat X_{ij}=g_j\frac{X_{ij}-\mu_j}{\sqrt{s_j^2+\varepsilon_0}}+b_j$
    Shapes: X (B, d), g, b (d,) -> (B, d); the samples of a batch are no longer independent
    Raises: ValueError for other shapes.
    Source: notes §5.1; Ioffe and Szegedy 2015.
    """
    _check("batch_norm_1d", X, g, b, 2, "(B, d)")
    return _affine(_normalise(X, (0,), eps), g, b)


def _example_2d(rng):
    return (rng.normal(size=(2, 4, 3, 2)), rng.normal(size=4), rng.normal(size=4)), {}


@written("batch_norm_2d", example=_example_2d)
def batch_norm_2d(
    X: Float[Tensor, "B C H W"], g: Float[Tensor, " C"], b: Float[Tensor, " C"], eps: float = 1e-5
) -> Float[Tensor, "B C H W"]:
    r"""Normalise every channel over the batch and over all places.

    Equation: `batchnorm-2d` $\mu_c=\frac1{BHW}\sum_{b,h,w}X_{bchw}$ and $s_c^2$ alike, a gain and a shift for each channel
    Shapes: X (B, C, H, W), g, b (C,) -> (B, C, H, W)
    Raises: ValueError for other shapes.
    Source: notes §5.1.
    """
    _check("batch_norm_2d", X, g, b, 4, "(B, C, H, W)")
    return _affine(_normalise(X, (0, 2, 3), eps), g, b)


@written("group_norm", example=lambda rng: (_example_2d(rng)[0], {"n_groups": [1, 2, 4][rng.integers(3)]}))
def group_norm(
    X: Float[Tensor, "B C *places"], g: Float[Tensor, " C"], b: Float[Tensor, " C"], n_groups: int, eps: float = 1e-5
) -> Float[Tensor, "B C *places"]:
    r"""Normalise groups of channels, sample by sample.

    Equation: `groupnorm` mean and variance over the $C/G_{\rm n}$ channels of a group and all places of one sample, then $g_c,b_c$
    Shapes: X (B, C, ...), g, b (C,) -> (B, C, ...); one group: LayerNorm over the sample; C groups: InstanceNorm
    Raises: ValueError for other shapes, or a number of groups that does not divide C.
    Source: notes §5.1; Wu and He 2018.
    """
    require(X.ndim >= 2, "group_norm", "X", "of shape (B, C, ...)", X)
    _check("group_norm", X, g, b, X.ndim, "(B, C, ...)")
    require_positive(n_groups, "group_norm", "n_groups", integer=True)
    require(X.shape[1] % n_groups == 0, "group_norm", "n_groups", f"a divisor of C = {X.shape[1]}", n_groups)
    in_group = prod(X.shape[1:]) // n_groups
    grouped = X.reshape(X.shape[0], n_groups, in_group)  # (B, G, C / G * places)
    return _affine(_normalise(grouped, (2,), eps).reshape(X.shape), g, b)


@dataclass
class RunningStatistics:
    r"""Mean and variance of every channel as inference uses them: an average over the batches of training.

    Equation: `batchnorm-running` $\hat\mu\leftarrow(1-m)\hat\mu+m\mu$, and the same for $s^2$, unbiased
    Shapes: mean, variance (C,); X (B, C, ...)
    Raises: ValueError for a momentum outside (0, 1], channels that do not fit, or a single value to estimate from.
    Source: notes §5.1; Ioffe and Szegedy 2015.
    Differs: training and inference compute different functions, which LayerNorm does not (erratum 108).
    """

    mean: Float[np.ndarray, " C"]
    variance: Float[np.ndarray, " C"]
    momentum: float = 0.1

    def __post_init__(self) -> None:
        require(0 < self.momentum <= 1, "RunningStatistics", "the momentum", "in (0, 1]", self.momentum)

    @classmethod
    def fresh(cls, channels: int, momentum: float = 0.1) -> "RunningStatistics":
        """Mean 0 and variance 1, before any batch."""
        require_positive(channels, "RunningStatistics", "channels", integer=True)
        return cls(np.zeros(channels), np.ones(channels), momentum)

    def update(self, X: Float[np.ndarray, "B C *places"]) -> None:
        """Take one batch of training into account."""
        fits = X.ndim >= 2 and X.shape[1] == len(self.mean)
        require(fits, "RunningStatistics", "X", f"of shape (B, C = {len(self.mean)}, ...)", X)
        axes = (0, *range(2, X.ndim))
        n = X.size // X.shape[1]
        require(n > 1, "RunningStatistics", "the batch", "at least two values for each channel", X)
        self.mean = (1 - self.momentum) * self.mean + self.momentum * X.mean(axes)
        self.variance = (1 - self.momentum) * self.variance + self.momentum * X.var(axes, ddof=1)

    def apply(self, X: Tensor, g: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
        """Normalise by the running statistics: every sample for itself."""
        shape = (1, -1, *(1,) * (X.ndim - 2))
        centred = X - self.mean.reshape(shape).astype(X.dtype)
        return _affine(centred * (1 / np.sqrt(self.variance + eps)).reshape(shape).astype(X.dtype), g, b)


@dataclass(frozen=True)
class NormCost:
    """What a norm of one row costs: sums over the row, operations, and parameters."""

    reductions: int
    operations: int
    parameters: int


def norm_cost(kind: str, d: int) -> NormCost:
    r"""Counted from the formulas: LayerNorm needs a sum, a subtraction and an addition more than RMSNorm.

    Equation: `norm-cost` LayerNorm: 2 reductions, $2d$ parameters; RMSNorm: 1 reduction, $d$ parameters
    Shapes: -> counts for a row of d entries
    Raises: ValueError for an unknown kind or a width that is not positive.
    Source: notes §5.2.
    Differs: "30 %" and "2 to 6 %" of time saved are claims, to be measured and not asserted (erratum 14).
    """
    require(kind in ("layernorm", "rmsnorm"), "norm_cost", "the kind", "layernorm or rmsnorm", kind)
    require_positive(d, "norm_cost", "d", integer=True)
    if kind == "rmsnorm":  # square, sum, scale, gain
        return NormCost(1, 4 * d, d)
    return NormCost(2, 7 * d, 2 * d)  # sum, subtract, square, sum, scale, gain, shift
