r"""Attention whose keys and values know how far away they are: Shaw's relative positions, as a mixer."""

from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require, require_positive
from minillm.functional.attention import keep_of
from minillm.functional.relative_positions import shaw_attention
from minillm.nn.module import parameter
from minillm.nn.multi_head import MultiHeadAttention


class ShawAttention(MultiHeadAttention):
    r"""Multi-head self-attention with a learnt vector for every distance up to c, for keys and for values.

    Equation: `pos-relative-shaw` $S_{ij}=q_i^\top(k_j+a^K_{ij})/\sqrt{d_{\rm head}},\ o_i=\sum_j\alpha_{ij}(v_j+a^V_{ij}),\ a_{ij}=w_{\mathrm{clip}(j-i,-c,c)}$
    Shapes: x (B, L, d_model) -> (B, L, d_model)
    Raises: ValueError for a distance that is not a positive integer, grouped keys, a window, scores scaled otherwise, a
        memory or a bias.
    Source: notes §6; Shaw et al. 2018.

    A layer has its own vectors, which its heads share. Its cache is that of multi-head attention: distances are looked
    up when the keys are read.
    """

    def __init__(self, d_model: int, n_heads: int, rng: np.random.Generator, *, distance: int = 16, **options: Any):
        require_positive(distance, "ShawAttention", "distance", integer=True)
        super().__init__(d_model, n_heads, rng, **options)
        fits = self.n_kv_heads == n_heads
        require(fits, "ShawAttention", "n_kv_heads", f"n_heads = {n_heads}", self.n_kv_heads)
        require(self.window is None, "ShawAttention", "the window", "left out", self.window)
        require(self.scale is None, "ShawAttention", "the scale", "left out (one over the root of d_head)", self.scale)
        std, shape = options.get("std", 0.02), (2 * distance + 1, self.d_head)
        self.relative_k, self.relative_v = (parameter(rng.normal(0.0, std, size=shape)) for _ in "kv")

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        for name in ("memory", "bias"):
            require(given.get(name) is None, "ShawAttention", f"the {name}", "left out", given.get(name))
        return super().forward(x, **given)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Any, bias: Any, pattern: dict, rng: Any = None) -> Tensor:
        """Contexts (B, H, L_q, d_head); the last query is aligned with the last key."""
        keep = keep_of(q.shape[2], k.shape[2], keep, pattern.get("causal", False), None)
        return shaw_attention(q, k, v, self.relative_k, self.relative_v, keep)
