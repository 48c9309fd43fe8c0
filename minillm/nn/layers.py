r"""The plain layers of a decoder: linear, embedding, RMSNorm, SwiGLU.

Weights are stored (d_out, d_in), as in torch and in checkpoints. The initial standard deviation is 0.02 unless the
model says otherwise (narrow models learn faster from about $1/\sqrt{d_{\rm model}}$), and for maps that write into the
residual stream it is divided by $\sqrt{2N_{\rm layer}}$, so that the sum of $2N_{\rm layer}$ branches keeps its size.
"""

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require_positive
from minillm.fused.activations import swiglu
from minillm.fused.linear import embedding, linear
from minillm.fused.norms import rms_norm
from minillm.nn.module import Module, parameter

INIT_STD = 0.02


class Linear(Module):
    r"""Affine map without bias.

    Equation: `linear-layer` $\mathbf X\mathbf W^\top$
    Shapes: (..., d_in) -> (..., d_out)
    Raises: ValueError for sizes that are not positive.
    Source: bridging §1.3.
    """

    def __init__(self, d_in: int, d_out: int, rng: np.random.Generator, std: float = INIT_STD):
        require_positive(d_in, "Linear", "d_in", integer=True)
        require_positive(d_out, "Linear", "d_out", integer=True)
        self.weight = parameter(rng.normal(0.0, std, size=(d_out, d_in)))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Embedding(Module):
    r"""Token table.

    Equation: `token-embedding` $\mathbf X=\mathbf W_{\rm emb}[\mathrm{ids}]$
    Shapes: ids (...) -> (..., d_model)
    Raises: ValueError for sizes that are not positive.
    Source: lecture06 (Embeddings).
    """

    def __init__(self, vocab_size: int, d_model: int, rng: np.random.Generator, std: float = INIT_STD):
        require_positive(vocab_size, "Embedding", "vocab_size", integer=True)
        require_positive(d_model, "Embedding", "d_model", integer=True)
        self.weight = parameter(rng.normal(0.0, std, size=(vocab_size, d_model)))

    def forward(self, ids: np.ndarray) -> Tensor:
        return embedding(ids, self.weight)


class RMSNorm(Module):
    r"""Root-mean-square normalisation with a gain that starts at 1.

    Equation: `rmsnorm` $\mathbf g\odot\mathbf x/\sqrt{\frac1d\sum_ix_i^2+\varepsilon_0}$
    Shapes: (..., d) -> (..., d)
    Raises: ValueError for a width that is not positive or a negative eps.
    Source: lecture06 (RMSNorm).
    """

    def __init__(self, d: int, eps: float = 1e-5):
        require_positive(d, "RMSNorm", "d", integer=True)
        require_positive(eps, "RMSNorm", "eps", zero_ok=True)
        self.gain = parameter(np.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain, eps=self.eps)


class SwiGLU(Module):
    r"""Gated feed-forward network; value and gate come from one joint map.

    Equation: `glu-ffn` $\mathrm{GLU}(\mathbf X)\,\mathbf W_{\rm down}$
    Equation: `swiglu` $(\mathrm{SiLU}(\mathbf X\mathbf W_1)\odot\mathbf X\mathbf W_2)\mathbf W_3$
    Shapes: (..., d_model) -> (..., d_model)
    Raises: ValueError for sizes that are not positive.
    Source: lecture06 (SwiGLU); notes §8.7.
    """

    def __init__(
        self, d_model: int, d_ff: int, rng: np.random.Generator, std: float = INIT_STD, std_out: float = INIT_STD
    ):
        require_positive(d_model, "SwiGLU", "d_model", integer=True)
        require_positive(d_ff, "SwiGLU", "d_ff", integer=True)
        self.w_value_gate = parameter(rng.normal(0.0, std, size=(2 * d_ff, d_model)))
        self.w_down = parameter(rng.normal(0.0, std_out, size=(d_model, d_ff)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = swiglu(linear(x, self.w_value_gate))  # (..., d_ff)
        return linear(hidden, self.w_down)  # (..., d_model)
