r"""Feature maps of linear attention: what stands in for the exponential of a score.

Linear attention replaces $\exp(q\cdot k/\sqrt{d_{\rm head}})$ by an inner product $\phi(q)\cdot\phi(k)$. Two things
tell the maps apart, and `FEATURE_MAPS` says them: whether the product is never negative (else the normaliser may
cross zero), and whether its expectation *is* that exponential or it is another kernel of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, cat, where
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of, require_positive


def _example(rng):
    shape = [(2, 3), (1, 2, 1, 4), (5,)][rng.integers(3)]
    x = rng.normal(size=shape)
    return (np.sign(x) * (0.05 + np.abs(x)),), {}


@written("elu1_features", example=_example)
def elu1_features(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""ELU plus one, element by element: the exponential below 0, a line above.

    Equation: `feature-map-elu1` $\phi(x)=\mathrm{ELU}(x)+1$
    Shapes: (..., d) -> (..., d), positive
    Source: notes §4.10; Katharopoulos et al. 2020.
    Differs: a kernel of its own, not an approximation of the softmax's (erratum 29).
    """
    return where(x.data > 0, x + 1.0, ops.minimum(x, 0.0).exp())


def _example_relu(rng):
    return _example(rng)[0], {"power": int(rng.integers(1, 3))}


@written("relu_features", example=_example_relu)
def relu_features(x: Float[Tensor, "..."], power: int = 1) -> Float[Tensor, "..."]:
    r"""ReLU or its square, element by element.

    Equation: `feature-map-relu` $\phi(x)=\max(0,x)^{1,2}$
    Shapes: (..., d) -> (..., d), never negative, but all of it may be 0, where the stabiliser decides
    Raises: ValueError for a power other than 1 and 2.
    Source: notes §4.10.
    """
    require_one_of(power, (1, 2), "relu_features", "power")
    kept = x.relu()
    return kept if power == 1 else kept * kept


def _example_exp(rng):
    return _example(rng)[0], {"c": [None, 2.0][rng.integers(2)]}


@written("exp_features", example=_example_exp)
def exp_features(x: Float[Tensor, "... d"], c: float | None = None) -> Float[Tensor, "... d"]:
    r"""Exponential of each element over a constant.

    Equation: `feature-map-exp` $\phi(x)=\exp(x/c)$, $c=d_{\rm head}^{1/4}$ unless given
    Shapes: (..., d) -> (..., d), positive
    Raises: ValueError unless c is positive.
    Source: notes §4.10.
    Differs: the notes print $c=d_{\rm head}$, which is so flat that the weights are nearly uniform; that value can
        be given. With either it is not an approximation of the softmax's kernel (erratum 29).
    """
    width = float(x.shape[-1] ** 0.25) if c is None else c
    require_positive(width, "exp_features", "c")
    return (x * (1.0 / width)).exp()


def draw_directions(
    m: int, d_head: int, rng: np.random.Generator, orthogonal: bool = False
) -> Float[np.ndarray, "m d_head"]:
    r"""Random directions of the random feature maps.

    Equation: `feature-map-normalised` orthogonal $\omega$: lower variance
    Shapes: -> (m, d_head); each row is $\mathcal N(0,\mathbf I)$, and if ``orthogonal`` the rows of a group of d_head
        are orthogonal to each other, their lengths still those of Gaussian vectors.
    Raises: ValueError unless m and d_head are positive integers.
    Source: notes §4.10; Choromanski et al. 2021.
    """
    require_positive(m, "draw_directions", "m", integer=True)
    require_positive(d_head, "draw_directions", "d_head", integer=True)
    omega = rng.normal(size=(m, d_head))
    if not orthogonal:
        return omega
    lengths = np.linalg.norm(omega, axis=1, keepdims=True)
    groups = []
    for _ in range(-(-m // d_head)):
        q, r = np.linalg.qr(rng.normal(size=(d_head, d_head)))
        groups.append(q * np.sign(np.diag(r)))  # the signs make the rotation uniform
    return lengths * np.concatenate(groups)[:m]


def _check_directions(name: str, x, omega) -> None:
    fits = omega.ndim == 2 and len(omega) > 0 and omega.shape[1] == x.shape[-1]
    require(fits, name, "omega", f"of shape (m, d_head={x.shape[-1]})", omega)


def _example_random(rng):
    shape = [(2, 3), (1, 2, 1, 3), (3,)][rng.integers(3)]
    return (rng.normal(size=shape),), {"omega": rng.normal(size=(int(rng.integers(1, 5)), 3))}


@written("fourier_features", example=_example_random)
def fourier_features(x: Float[Tensor, "... d"], omega: Float[np.ndarray, "m d"]) -> Float[Tensor, "... twice_m"]:
    r"""Random Fourier features: cosines and sines along random directions.

    Equation: `feature-map-rff` $\phi(x)=e^{\lVert x\rVert^2/2}\sqrt{\tfrac1m}[\cos\omega x,\sin\omega x]$, $x\leftarrow x/d_{\rm head}^{1/4}$
    Shapes: x (..., d_head), omega (m, d_head) -> (..., 2 m)
    Raises: ValueError if omega is not (m, d_head).
    Source: notes §4.10; Rahimi and Recht 2007.
    Differs: unbiased for $e^{q\cdot k/\sqrt{d_{\rm head}}}$ but signed, so not among the positive maps (erratum 29).
    """
    _check_directions("fourier_features", x, omega)
    x = x * float(x.shape[-1] ** -0.25)
    projected = x @ omega.T.astype(x.dtype)  # (..., m)
    size = (0.5 * (x * x).sum(-1, keepdims=True)).exp() * float(len(omega) ** -0.5)
    return cat([size * ops.cos(projected), size * ops.sin(projected)], axis=-1)  # (..., 2 m)


@written("positive_features", example=_example_random)
def positive_features(x: Float[Tensor, "... d"], omega: Float[np.ndarray, "m d"]) -> Float[Tensor, "... m"]:
    r"""Positive random features, whose products are the softmax's kernel on average.

    Equation: `feature-map-favor` $\phi(x)=\frac1{\sqrt m}\exp(\omega x-\lVert x\rVert^2/2)$, $x\leftarrow x/d_{\rm head}^{1/4}$
    Shapes: x (..., d_head), omega (m, d_head) -> (..., m), positive
    Raises: ValueError if omega is not (m, d_head).
    Source: Choromanski et al. 2021.
    Differs: this is the positive and unbiased map that the notes look for (erratum 29).
    """
    _check_directions("positive_features", x, omega)
    x = x * float(x.shape[-1] ** -0.25)
    projected = x @ omega.T.astype(x.dtype)  # (..., m)
    return (projected - 0.5 * (x * x).sum(-1, keepdims=True)).exp() * float(len(omega) ** -0.5)


@written(
    "softmax_features", example=lambda rng: ((rng.normal(size=[(2, 3), (1, 1), (2, 1, 2, 4)][rng.integers(3)]),), {})
)
def softmax_features(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    r"""Softmax over the features of a token, so that every row sums to 1.

    Equation: `feature-map-normalised` $\phi(x)=\mathrm{softmax}(x)$
    Shapes: (..., d) -> (..., d), positive
    Source: notes §4.10.
    """
    e = (x - x.data.max(-1, keepdims=True)).exp()
    return e / e.sum(-1, keepdims=True)


class FeatureMap(NamedTuple):
    """A feature map and what is true of it."""

    function: Callable[..., Tensor]
    positive: bool  # products of features are never negative
    approximates_softmax: bool  # and their expectation is exp(q . k / sqrt(d_head))
    random: bool  # takes directions omega

    def width(self, d_head: int, m: int) -> int:
        """How many features come out, with m directions if it takes any."""
        return d_head if not self.random else 2 * m if self.function is fourier_features else m


FEATURE_MAPS = {
    "elu1": FeatureMap(elu1_features, True, False, False),
    "relu": FeatureMap(relu_features, True, False, False),
    "relu2": FeatureMap(lambda x: relu_features(x, power=2), True, False, False),
    "exp": FeatureMap(exp_features, True, False, False),
    "softmax": FeatureMap(softmax_features, True, False, False),
    "fourier": FeatureMap(fourier_features, False, True, True),
    "positive": FeatureMap(positive_features, True, True, True),
}


def feature_map(kind: str) -> FeatureMap:
    """Look a feature map up by name.

    Raises: ValueError for an unknown name, with those there are.
    """
    require_one_of(kind, FEATURE_MAPS, "feature_map", "kind")
    return FEATURE_MAPS[kind]
