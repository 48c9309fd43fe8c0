r"""Attention through a few latents: a long sequence is read by an array of M learnt vectors, M much shorter."""

from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require, require_positive
from minillm.fused.norms import layer_norm
from minillm.nn.layers import INIT_STD, RMSNorm, SwiGLU
from minillm.nn.module import Module, parameter
from minillm.nn.multi_head import MultiHeadAttention


def learnt_array(M: int, d: int, rng: np.random.Generator, where: str, what: str) -> Tensor:
    """M learnt vectors of width d."""
    require_positive(M, where, what, integer=True)
    return parameter(rng.normal(0.0, INIT_STD, size=(M, d)))


def over_batch(latents: Tensor, B: int) -> Tensor:
    """The same latents for every sequence: (M, d) -> (B, M, d)."""
    return latents.unsqueeze(0).expand(B, *latents.shape)


class LatentBlock(Module):
    r"""A Perceiver block: the latents read the sequence, then each other, then each for itself.

    Equation: `latent-transformer-block` $\mathbf Z\leftarrow\mathbf Z+\mathrm{CrossAttn}(\mathbf Z,\mathbf X),\ \mathbf Z\leftarrow\mathbf Z+\mathrm{SelfAttn}(\mathbf Z),\ \mathbf Z\leftarrow\mathbf Z+\mathrm{FFN}(\mathbf Z)$, each behind its norm
    Equation: `perceiver-latent-attention` the first of the three
    Shapes: z (B, M, d_model), x (B, L, d_memory), keep broadcastable to (B, H, M, L) -> (B, M, d_model), for any L
    Raises: ValueError for head counts or widths that do not belong together.
    Source: notes §4.6; Jaegle et al. 2021.
    Differs: with residual additions, which the source's formulas leave out (erratum 25).
    """

    def __init__(self, d_model: int, n_heads: int, d_ff: int, rng: np.random.Generator, d_memory: int | None = None):
        d_memory = d_model if d_memory is None else d_memory
        self.cross_norm, self.memory_norm = RMSNorm(d_model), RMSNorm(d_memory)
        self.cross = MultiHeadAttention(d_model, n_heads, rng, d_memory=d_memory)
        self.attention_norm, self.ffn_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.attention = MultiHeadAttention(d_model, n_heads, rng)
        self.ffn = SwiGLU(d_model, d_ff, rng)

    def forward(self, z: Tensor, x: Tensor, keep: np.ndarray | None = None) -> Tensor:
        z = z + self.cross(self.cross_norm(z), memory=self.memory_norm(x), keep=keep)
        z = z + self.attention(self.attention_norm(z))
        return z + self.ffn(self.ffn_norm(z))  # (B, M, d_model)


class SetAttention(Module):
    r"""One set attends to another: a block with the norm after each addition, and no positions.

    Equation: `set-transformer-isab` $\mathrm{MAB}(\mathbf X,\mathbf Y)=\mathrm{LN}(\mathbf U+\mathrm{FFN}(\mathbf U)),\ \mathbf U=\mathrm{LN}(\mathbf X+\mathrm{MHA}(\mathbf X,\mathbf Y,\mathbf Y))$
    Shapes: x (B, L, d_model), y (B, S, d_model) -> (B, L, d_model)
    Source: notes §4.6; Lee et al. 2019.
    """

    def __init__(self, d_model: int, n_heads: int, d_ff: int, rng: np.random.Generator, eps: float = 1e-5):
        self.attention = MultiHeadAttention(d_model, n_heads, rng)
        self.ffn = SwiGLU(d_model, d_ff, rng)
        self.gain_1, self.shift_1 = parameter(np.ones(d_model)), parameter(np.zeros(d_model))
        self.gain_2, self.shift_2 = parameter(np.ones(d_model)), parameter(np.zeros(d_model))
        self.eps = eps

    def forward(self, x: Tensor, y: Tensor, keep: np.ndarray | None = None) -> Tensor:
        u = layer_norm(x + self.attention(x, memory=y, keep=keep), self.gain_1, self.shift_1, eps=self.eps)
        return layer_norm(u + self.ffn(u), self.gain_2, self.shift_2, eps=self.eps)


class InducedSetAttention(Module):
    r"""Attention among L elements at the price of L M: through M learnt inducing points and back.

    Equation: `set-transformer-isab` $\mathrm{ISAB}(\mathbf X)=\mathrm{MAB}(\mathbf X,\mathrm{MAB}(\mathbf I,\mathbf X)),\ \mathbf I\in\mathbb R^{M\times d}$
    Shapes: x (B, L, d_model), keep (B, 1, 1, L) -> (B, L, d_model); permuting the elements permutes the result
    Raises: ValueError unless there is at least one inducing point.
    Source: notes §4.6; Lee et al. 2019.
    """

    def __init__(self, d_model: int, n_heads: int, d_ff: int, n_points: int, rng: np.random.Generator):
        self.points = learnt_array(n_points, d_model, rng, "InducedSetAttention", "n_points")
        self.gather = SetAttention(d_model, n_heads, d_ff, rng)
        self.spread = SetAttention(d_model, n_heads, d_ff, rng)

    def forward(self, x: Tensor, keep: Any = None) -> Tensor:
        width = self.points.shape[1]
        require(x.ndim == 3 and x.shape[-1] == width, "InducedSetAttention", "x", f"of shape (B, L, {width})", x)
        return self.spread(x, self.gather(over_batch(self.points, x.shape[0]), x, keep))
