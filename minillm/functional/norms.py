r"""Normalisation layers as written: the equations composed of primitives."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require


def check_gain(where: str, x, g, what: str = "the gain g") -> None:
    """Refuse a gain or shift that does not match the normalised axis."""
    require(x.ndim >= 1 and g.shape == (x.shape[-1],), where, what, f"of shape ({x.shape[-1] if x.ndim else 'd'},)", g)


def _example(rng):
    shape = [(2, 3, 5), (1, 4), (3, 1), (7,), (0, 3)][rng.integers(5)]
    return (rng.normal(size=shape), rng.normal(size=shape[-1])), {}


def _example_shifted(rng):
    (x, g), _ = _example(rng)
    return (x, g, rng.normal(size=g.shape)), {}


def _example_residual(rng):
    (x, g), _ = _example(rng)
    return (x, rng.normal(size=x.shape), g), {}


@written("rms_norm", example=_example)
def rms_norm(x: Float[Tensor, "*B d"], g: Float[Tensor, " d"], eps: float = 1e-6) -> Float[Tensor, "*B d"]:
    r"""Divide by the root mean square of the last axis and multiply by a gain.

    Equation: `rmsnorm` $\mathbf g\odot\mathbf x\,/\sqrt{\frac1d\sum_i x_i^2+\varepsilon_0}$
    Shapes: x (..., d), g (d,) -> (..., d)
    Raises: ValueError if g is not (d,).
    Source: lecture06 (RMSNorm); notes §5.2; Zhang and Sennrich 2019.
    Differs: the result has RMS 1 before the gain, so its length is the root of d and not 1 (erratum 11).
    """
    check_gain("rms_norm", x, g)
    mean_square = (x * x).mean(-1, keepdims=True)  # (..., 1)
    return g * (x / (mean_square + eps).sqrt())


@written("layer_norm", example=_example_shifted)
def layer_norm(
    x: Float[Tensor, "*B d"], g: Float[Tensor, " d"], b: Float[Tensor, " d"], eps: float = 1e-5
) -> Float[Tensor, "*B d"]:
    r"""Centre the last axis, divide by its standard deviation, then scale and shift.

    Equation: `layernorm` $\mathbf g\odot\frac{\mathbf x-\mu}{\sqrt{s^2+\varepsilon_0}}+\mathbf b$
    Shapes: x (..., d), g (d,), b (d,) -> (..., d)
    Raises: ValueError if g or b is not (d,).
    Source: bridging §1.4; notes §4.7; Ba, Kiros and Hinton 2016.
    Differs: the root is of the variance, and g is the scale, b the shift (erratum 10).
    """
    check_gain("layer_norm", x, g)
    check_gain("layer_norm", x, b, "the shift b")
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)  # (..., 1)
    return g * (centred / (variance + eps).sqrt()) + b


@written("add_rms_norm", example=_example_residual)
def add_rms_norm(
    x: Float[Tensor, "*B d"], r: Float[Tensor, "*B d"], g: Float[Tensor, " d"], eps: float = 1e-6
) -> tuple[Float[Tensor, "*B d"], Float[Tensor, "*B d"]]:
    r"""Add a branch to the residual stream and normalise the sum for the next branch.

    Equation: `pre-ln` $s=\mathbf x+\mathbf r,\ y=\mathrm{RMSNorm}(s)$, the joint of two pre-norm blocks
    Shapes: x (..., d), r (..., d), g (d,) -> s (..., d), y (..., d)
    Raises: ValueError if x and r differ in shape or g is not (d,).
    Source: notes §4.7 and §8; topics #21.
    """
    require(x.shape == r.shape, "add_rms_norm", "the branch r", f"of the stream's shape {x.shape}", r)
    s = x + r
    return s, rms_norm(s, g, eps)


@written("rms_norm_of_centred", example=_example)
def rms_norm_of_centred(x: Float[Tensor, "*B d"], g: Float[Tensor, " d"], eps: float = 1e-5) -> Float[Tensor, "*B d"]:
    r"""LayerNorm without shift, as RMSNorm behind a centring map.

    Equation: `rmsnorm-layernorm-relation` $\mathrm{LN}(\mathbf x)=\mathrm{RMSNorm}(\mathbf C\mathbf x),\ \mathbf C=\mathbf I-\frac1d\mathbf 1\mathbf 1^\top$
    Shapes: x (..., d), g (d,) -> (..., d)
    Raises: ValueError if g is not (d,).
    Source: notes §5.2.
    Differs: what is exact is that centring is linear and can be folded into weights, not that a bias absorbs the mean
        (erratum 12).
    """
    d = x.shape[-1]
    centring = np.eye(d, dtype=x.dtype) - np.full((d, d), 1.0 / d, x.dtype)
    return rms_norm(x @ centring, g, eps)


@written(
    "split_mean_shift",
    example=lambda rng: ((rng.normal(size=(3, 4)), rng.normal(size=(2, 4)), rng.normal(size=2)), {}),
)
def split_mean_shift(
    y: Float[Tensor, "*B d"], w: Float[Tensor, "k d"], b: Float[Tensor, " k"]
) -> tuple[Float[Tensor, "*B k"], Float[Tensor, "*B k"]]:
    r"""Split an affine map into what the mean of its input contributes, bias included, and the rest.

    Equation: `rmsnorm-mean-shift` $\mathbf Wy+b=\mathbf W(y-\mu_y\mathbf 1)+(b+\mu_y\mathbf W\mathbf 1)$
    Shapes: y (..., d), w (k, d), b (k,) -> two of (..., k), which add up to the map
    Source: notes §5.2.
    Differs: the mean varies by token, so no constant bias takes its place (erratum 12).
    """
    mean = y.mean(-1, keepdims=True)  # (..., 1)
    return b + mean * w.sum(-1), (y - mean) @ w.T


def _example_block(rng):
    (x, g), _ = _example(rng)
    return (x, lambda t: t * t, g), {}


@written("pre_norm_residual", example=_example_block)
def pre_norm_residual(x: Tensor, branch: Callable[[Tensor], Tensor], g: Tensor, eps: float = 1e-6) -> Tensor:
    r"""A residual block that normalises what its branch reads.

    Equation: `pre-ln` $\mathbf x\leftarrow\mathbf x+F(\mathrm{Norm}(\mathbf x))$
    Shapes: x (..., d) -> (..., d)
    Source: notes §4.7; topics #21.
    Differs: the stream itself is not normalised and grows with depth (erratum 13).
    """
    return x + branch(rms_norm(x, g, eps))


@written("post_norm_residual", example=_example_block)
def post_norm_residual(x: Tensor, branch: Callable[[Tensor], Tensor], g: Tensor, eps: float = 1e-6) -> Tensor:
    r"""A residual block that normalises the sum.

    Equation: `post-ln` $\mathbf x\leftarrow\mathrm{Norm}(\mathbf x+F(\mathbf x))$
    Shapes: x (..., d) -> (..., d)
    Source: notes §4.7; topics #21.
    """
    return rms_norm(x + branch(x), g, eps)
