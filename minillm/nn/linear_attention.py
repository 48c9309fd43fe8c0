"""Linear attention as a mixer: a state of fixed size instead of a cache that grows."""

from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require, require_positive
from minillm.functional.attention import repeat_heads
from minillm.functional.feature_maps import draw_directions, feature_map
from minillm.functional.linear_attention import linear_attention
from minillm.fused.linear import linear
from minillm.fused.linear_attention import linear_attention_chunked
from minillm.nn.layers import INIT_STD
from minillm.nn.module import Module, parameter
from minillm.nn.window_cache import StateCache


class LinearAttention(Module):
    r"""Multi-head linear attention, causal (in chunks) or over all positions.

    Equation: `linear-attention` $\frac{\mathbf S_V\phi(\mathbf q_i)}{\mathbf S_K\phi(\mathbf q_i)+\varepsilon_0}$, with ``causal=False``
    Equation: `linear-attention-causal` the same with running sums; the cache holds them
    Shapes: x (B, L, d_model), memory (B, S, d_model) -> (B, L, d_model)
    Raises: ValueError for heads that do not divide, an unknown feature map, a memory in a causal layer, a bias, or a
        mask that is not one of padding, (B, 1, 1, S).
    Source: notes §4.10; Katharopoulos et al. 2020.

    Random feature maps draw their directions once, from ``rng``; they are not trained. ``turn`` is as in
    `MultiHeadAttention`, before the feature map.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        rng: np.random.Generator,
        *,
        n_kv_heads: int | None = None,
        features: str = "elu1",
        n_features: int | None = None,
        orthogonal: bool = True,
        causal: bool = True,
        chunk: int = 64,
        eps: float = 1e-6,
        turn: Any = None,
        std: float = INIT_STD,
        std_out: float | None = None,
    ):
        where = "LinearAttention"
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        sizes = {"d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "chunk": chunk}
        for name, value in sizes.items():
            require_positive(value, where, name, integer=True)
        require(d_model % n_heads == 0, where, "n_heads", f"a divisor of d_model = {d_model}", n_heads)
        require(n_heads % n_kv_heads == 0, where, "n_kv_heads", f"a divisor of n_heads = {n_heads}", n_kv_heads)
        self.d_model, self.n_heads, self.n_kv_heads, self.d_head = d_model, n_heads, n_kv_heads, d_model // n_heads
        self.causal, self.chunk, self.eps, self.turn = causal, chunk, eps, turn
        self.features = feature_map(features)
        m = 2 * self.d_head if n_features is None else n_features
        self.omega = draw_directions(m, self.d_head, rng, orthogonal) if self.features.random else None
        self.d_phi = self.features.width(self.d_head, m)
        d_kv = n_kv_heads * self.d_head
        self.w_q = parameter(rng.normal(0.0, std, size=(d_model, d_model)))
        self.w_k = parameter(rng.normal(0.0, std, size=(d_kv, d_model)))
        self.w_v = parameter(rng.normal(0.0, std, size=(d_kv, d_model)))
        self.w_out = parameter(rng.normal(0.0, std if std_out is None else std_out, size=(d_model, d_model)))

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        keep: np.ndarray | None = None,
        bias: Any = None,
        positions: np.ndarray | None = None,
        cache: StateCache | None = None,
    ) -> Tensor:
        where = "LinearAttention"
        require(x.ndim == 3 and x.shape[-1] == self.d_model, where, "x", f"of shape (B, L, {self.d_model})", x)
        require(bias is None, where, "the bias", "None (there are no scores to add it to)", bias)
        require(memory is None or not self.causal, where, "the memory", "None in a causal layer", memory)
        B, L, _ = x.shape
        start = 0 if cache is None else cache.length
        at = np.arange(start, start + L) if positions is None else positions
        source = x if memory is None else memory
        q, k = self._heads(x, self.w_q, at), self._heads(source, self.w_k, at if memory is None else None)
        v = self._heads(source, self.w_v)
        times = self.n_heads // self.n_kv_heads
        phi_q, phi_k, v = self._map(q), repeat_heads(self._map(k), times), repeat_heads(v, times)
        if keep is not None:
            fits = keep.dtype == bool and keep.shape == (B, 1, 1, source.shape[1])
            require(fits, where, "the mask", f"one of padding, boolean of shape {(B, 1, 1, source.shape[1])}", keep)
            phi_k = phi_k * keep[:, :, 0, :, None].astype(phi_k.dtype)
        if not self.causal:
            out = linear_attention(phi_q, phi_k, v, self.eps)  # (B, H, L, d_head)
        else:
            before = (None, None) if cache is None else cache.append(phi_k, v)
            out, _, _ = linear_attention_chunked(phi_q, phi_k, v, *before, chunk=self.chunk, eps=self.eps)
        return linear(out.transpose(1, 2).reshape(B, L, self.d_model), self.w_out)

    def _heads(self, x: Tensor, weight: Tensor, at: np.ndarray | None = None) -> Tensor:
        heads = linear(x, weight).reshape(*x.shape[:2], -1, self.d_head).transpose(1, 2)  # (B, heads, L, d_head)
        return heads if self.turn is None or at is None else self.turn(heads, at)

    def _map(self, x: Tensor) -> Tensor:
        return self.features.function(x) if self.omega is None else self.features.function(x, omega=self.omega)

    def new_cache(self, batch: int, capacity: int | None = None, dtype: Any = np.float32) -> StateCache:
        """Empty running sums; they have the same size for any number of tokens."""
        return StateCache(batch, self.n_heads, self.d_phi, self.d_head, dtype)
