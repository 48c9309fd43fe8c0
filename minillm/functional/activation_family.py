r"""More activations as written, and all of them by name."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, where
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of, require_positive
from minillm.functional.activations import gelu, gelu_tanh, silu


def _example(rng):
    x = 2 * rng.normal(size=[(2, 3), (4,), (), (0, 2)][rng.integers(4)])
    return (np.sign(x) * (0.05 + np.abs(x)),), {}  # away from the kink at 0


def _example_with(**choices):
    def draw(rng):
        return _example(rng)[0], {name: values[rng.integers(len(values))] for name, values in choices.items()}

    return draw


@written("relu_squared", example=_example)
def relu_squared(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""The square of the positive part.

    Equation: `relu-squared` $\max(0,x)^2$
    Shapes: any -> the same
    Source: notes §4.10; So et al. 2021.
    """
    positive = x.relu()
    return positive * positive


@written("swish", example=_example_with(beta=[0.5, 1.0, 3.0]))
def swish(x: Float[Tensor, "..."], beta: float = 1.0) -> Float[Tensor, "..."]:
    r"""Input times a logistic function of chosen slope.

    Equation: `swish-beta` $x\,\sigma(\beta_sx)$: SiLU at slope 1, ReLU in the limit
    Shapes: any -> the same
    Raises: ValueError for a negative slope.
    Source: notes §8.6; Ramachandran et al. 2017.
    """
    require_positive(beta, "swish", "beta", zero_ok=True)
    return x * (x * float(beta)).sigmoid()


@written("softplus", example=_example)
def softplus(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""A smooth positive part, computed without overflow.

    Equation: `softplus` $\log(1+e^x)=\max(x,0)+\log(1+e^{-|x|})$
    Shapes: any -> the same, positive
    Source: lecture06 (MoE).
    """
    return ops.logaddexp(x, 0.0)


@written("elu", example=_example_with(alpha=[1.0, 0.5]))
def elu(x: Float[Tensor, "..."], alpha: float = 1.0) -> Float[Tensor, "..."]:
    r"""The identity above 0, an exponential that levels off below.

    Equation: `elu` $x$ for $x>0$, $\alpha(e^x-1)$ otherwise
    Shapes: any -> the same, above -alpha
    Raises: ValueError unless alpha is positive.
    Source: notes §4.10; Clevert et al. 2016.
    """
    require_positive(alpha, "elu", "alpha")
    return where(x.data > 0, x, ops.expm1(ops.minimum(x, 0.0)) * float(alpha))


@written("leaky_relu", example=_example_with(a=[0.01, 0.2]))
def leaky_relu(x: Float[Tensor, "..."], a: float = 0.01) -> Float[Tensor, "..."]:
    r"""A positive part that lets a little of the negative one through.

    Equation: `activation-zoo` $\max(x,ax),\ a=0.01$
    Shapes: any -> the same
    Raises: ValueError unless 0 <= a <= 1.
    Source: topics #4.
    """
    require(0 <= a <= 1, "leaky_relu", "a", "in [0, 1]", a)
    return where(x.data > 0, x, x * float(a))


@written("mish", example=_example)
def mish(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Input times the hyperbolic tangent of its softplus.

    Equation: `activation-zoo` $x\tanh(\mathrm{softplus}(x))$
    Shapes: any -> the same
    Source: topics #4; Misra 2019.
    """
    return x * softplus(x).tanh()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.relu(),
    "relu_squared": relu_squared,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "swish": swish,
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": lambda x: x.tanh(),
    "softplus": softplus,
    "elu": elu,
    "leaky_relu": leaky_relu,
    "mish": mish,
    "identity": lambda x: x,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An activation by its name.

    Equation: `activation-zoo` twelve of them, and the identity
    Raises: ValueError that lists the names there are.
    Source: topics #4.
    """
    require_one_of(name, ACTIVATIONS, "activation", "the name")
    return ACTIVATIONS[name]


def dead_share(h: Float[np.ndarray, "N d_ff"]) -> float:
    r"""The share of units that are 0 for every row of a batch.

    Equation: `dead-relu` $\frac1{d_{\rm ff}}\#\{j:\max_n\phi_{\rm act}(h_{nj})\le0\}$
    Shapes: h (N, d_ff), what comes out of the activation -> a number in [0, 1]
    Raises: ValueError unless h has two axes and at least one row and unit.
    Source: notes §8.6; topics #20.
    """
    require(h.ndim == 2 and h.size > 0, "dead_share", "h", "of shape (N, d_ff), not empty", h)
    return float((h.max(0) <= 0).mean())
