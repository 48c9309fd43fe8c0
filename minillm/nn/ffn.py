r"""Feed-forward networks of every kind, by name: plain ones with an activation, gated ones with a gate."""

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require_one_of, require_positive
from minillm.functional.activation_family import ACTIVATIONS
from minillm.functional.feed_forward import GATES
from minillm.fused.activations import geglu, gelu, gelu_tanh, swiglu
from minillm.fused.linear import linear
from minillm.nn.layers import INIT_STD
from minillm.nn.module import Module, parameter

FUSED_GATES = {"swiglu": swiglu, "geglu": geglu}
FAST = {**ACTIVATIONS, "gelu": gelu, "gelu_tanh": gelu_tanh}  # derived where a model runs it and it pays
KINDS = (*(name for name in ACTIVATIONS if name not in ("identity", "swish")), *GATES)


class FeedForward(Module):
    r"""A network of one hidden layer, the same at every position: plain, ``relu``, ``gelu``, ..., or gated, ``swiglu``, ...

    Equation: `ffn` $\mathbf W_2\,\phi_{\rm act}(\mathbf W_1\mathbf x+\mathbf b_1)+\mathbf b_2$
    Equation: `glu-ffn` $\mathrm{GLU}(\mathbf X)\,\mathbf W_{\rm down}$
    Equation: `glu-split` value and gate of a gated kind come from one joint map [value; gate]
    Equation: `reglu-bilinear` kinds ``reglu`` and ``bilinear``
    Shapes: (..., d_model) -> (..., d_model)
    Raises: ValueError for an unknown kind or sizes that are not positive.
    Source: bridging §1.3; notes §8.6, §8.7; lecture06 (SwiGLU).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        kind: str,
        rng: np.random.Generator,
        *,
        bias: bool = False,
        std: float = INIT_STD,
        std_out: float | None = None,
    ):
        require_one_of(kind, KINDS, "FeedForward", "kind")
        require_positive(d_model, "FeedForward", "d_model", integer=True)
        require_positive(d_ff, "FeedForward", "d_ff", integer=True)
        self.kind, self.gated = kind, kind in GATES
        width = 2 * d_ff if self.gated else d_ff
        self.w_in = parameter(rng.normal(0.0, std, size=(width, d_model)))
        self.b_in = parameter(np.zeros(width)) if bias else None
        self.w_down = parameter(rng.normal(0.0, std if std_out is None else std_out, size=(d_model, d_ff)))
        self.b_down = parameter(np.zeros(d_model)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activate(linear(x, self.w_in, self.b_in))  # (..., d_ff)
        return linear(hidden, self.w_down, self.b_down)  # (..., d_model)

    def activate(self, h: Tensor) -> Tensor:
        """What happens between the two maps: (..., d_ff), or (..., 2 d_ff) of a gated kind, to (..., d_ff)."""
        if self.kind in FUSED_GATES:
            return FUSED_GATES[self.kind](h)
        if self.gated:
            d_ff = h.shape[-1] // 2
            return h[..., :d_ff] * FAST[GATES[self.kind]](h[..., d_ff:])
        return FAST[self.kind](h)
