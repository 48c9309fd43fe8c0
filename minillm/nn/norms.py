r"""Norms as modules, by name."""

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require_one_of, require_positive
from minillm.fused.norms import layer_norm
from minillm.nn.layers import RMSNorm
from minillm.nn.module import Module, parameter

KINDS = ("rmsnorm", "layernorm")


class LayerNorm(Module):
    r"""Mean 0 and variance 1 over the last axis, then a gain that starts at 1 and a shift that starts at 0.

    Equation: `layernorm` $\mathbf g\odot\frac{\mathbf x-\mu}{\sqrt{s^2+\varepsilon_0}}+\mathbf b$
    Equation: `wn-layernorm-eps` $\varepsilon_0=10^{-5}$ unless given
    Shapes: (..., d) -> (..., d)
    Raises: ValueError for a width or eps that is not positive.
    Source: bridging §1.4; notes §4.7.
    """

    def __init__(self, d: int, eps: float = 1e-5):
        require_positive(d, "LayerNorm", "d", integer=True)
        require_positive(eps, "LayerNorm", "eps")
        self.gain, self.shift = parameter(np.ones(d)), parameter(np.zeros(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.gain, self.shift, eps=self.eps)


def make_norm(kind: str, d: int, eps: float) -> RMSNorm | LayerNorm:
    """A norm by the name of its kind.

    Raises: ValueError for an unknown kind.
    """
    require_one_of(kind, KINDS, "make_norm", "norm")
    return RMSNorm(d, eps) if kind == "rmsnorm" else LayerNorm(d, eps)
