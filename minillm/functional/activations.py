r"""Activations and gated linear units as written."""

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require


def _example(rng):
    return (2 * rng.normal(size=[(2, 3), (4,), (), (0, 2)][rng.integers(4)]),), {}


@written("silu", example=_example)
def silu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Input times its logistic function.

    Equation: `silu` $x\,\sigma(x)$
    Shapes: any -> the same
    Source: notes §8.6; lecture06 (SwiGLU).
    """
    return x * x.sigmoid()


@written("gelu", example=_example)
def gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Input times the Gaussian distribution function.

    Equation: `gelu` $x\,\Phi(x)=\frac x2(1+\mathrm{erf}(x/\sqrt2))$
    Shapes: any -> the same
    Source: notes §8.6.
    Differs: it is the input times the distribution function, not an approximation of the distribution (erratum 15).
    """
    return x * (ops.erf(x * (1 / np.sqrt(2.0))) + 1.0) * 0.5


@written("gelu_tanh", example=_example)
def gelu_tanh(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""GELU by a hyperbolic tangent, within 5e-4 of the exact one.

    Equation: `gelu-tanh` $\frac x2\big(1+\tanh[\sqrt{2/\pi}(x+0.044715x^3)]\big)$
    Shapes: any -> the same
    Source: notes §8.7; Hendrycks and Gimpel 2016.
    """
    return x * ((x + x * x * x * 0.044715) * float(np.sqrt(2 / np.pi))).tanh() * 0.5 + x * 0.5


def split_gate(where: str, h):
    """The value half and the gate half of a joint projection."""
    require(h.ndim >= 1 and h.shape[-1] % 2 == 0, where, "the last axis", "of even length 2 d_ff: [value; gate]", h)
    half = h.shape[-1] // 2
    return h[..., :half], h[..., half:]


def _example_split(rng):
    return (rng.normal(size=[(2, 3, 6), (4, 2), (0, 4)][rng.integers(3)]),), {}


@written("swiglu", example=_example_split)
def swiglu(h: Float[Tensor, "*B two_d_ff"]) -> Float[Tensor, "*B d_ff"]:
    r"""Gated linear unit with SiLU on the gate, on a joint projection [value; gate].

    Equation: `swiglu` $\mathrm{SiLU}(\mathbf X\mathbf W_1)\odot\mathbf X\mathbf W_2$, gate $\mathbf W_1$, value $\mathbf W_2$
    Equation: `glu-split` one map of width $2d_{\rm ff}$ split in halves [value; gate]
    Shapes: h (..., 2 d_ff) -> (..., d_ff)
    Raises: ValueError for an odd last axis.
    Source: lecture06 (SwiGLU); notes §8.7.
    Differs: no biases, as in LLaMA (erratum 7).
    """
    value, gate = split_gate("swiglu", h)
    return value * silu(gate)


@written("geglu", example=_example_split)
def geglu(h: Float[Tensor, "*B two_d_ff"]) -> Float[Tensor, "*B d_ff"]:
    r"""Gated linear unit with GELU on the gate, on a joint projection [value; gate].

    Equation: `geglu` $\mathrm{GELU}(\mathbf X\mathbf W_g)\odot\mathbf X\mathbf W_v$
    Shapes: h (..., 2 d_ff) -> (..., d_ff)
    Raises: ValueError for an odd last axis.
    Source: notes §8.7.
    """
    value, gate = split_gate("geglu", h)
    return value * gelu(gate)
