r"""Multi-head attention, self and cross, with every choice that the models of this package make.

A mixer is called as ``mixer(x, memory=..., keep=..., bias=..., positions=..., cache=...)``; `MultiHeadAttention` is the
general one. `attention.py` has the LLaMA decoder's own, one matrix product for queries, keys and values and one
fused function for the rest.
"""

from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require, require_positive
from minillm.functional.attention import keep_of
from minillm.functional.multi_head import attention_with_dropout, check_rate, draw_dropped
from minillm.fused.attention import scaled_dot_product_attention
from minillm.fused.linear import linear
from minillm.fused.norms import rms_norm
from minillm.nn.cache import LayerCache
from minillm.nn.layers import INIT_STD
from minillm.nn.module import Module, parameter
from minillm.nn.window_cache import WindowCache


class MultiHeadAttention(Module):
    r"""Attention with H query heads over H_kv key/value heads, to the same sequence or to another.

    Equation: `mha` $\mathrm{Concat}_h(\mathrm{softmax}(\mathbf S_h)\mathbf V_h)\mathbf W_O(+\mathbf b_O)$
    Equation: `cross-attention` $\mathbf Q=\mathbf Z\mathbf W_q,\ \mathbf K=\mathbf X\mathbf W_k,\ \mathbf V=\mathbf X\mathbf W_v$ with ``memory`` X
    Equation: `self-attention` the same with $\mathbf Z=\mathbf X$
    Equation: `gqa` $g(h)=\lfloor hH_{kv}/H\rfloor$
    Equation: `attention-dropout` $\mathrm{dropout}(\mathrm{softmax}(\mathbf S))\mathbf V$ in training
    Equation: `vision-text-cross` ``memory`` may be of another modality and width, ``d_memory``
    Shapes: x (B, L, d_model), memory (B, S, d_memory) -> (B, L, d_model)
    Raises: ValueError for head counts that do not divide, a window without causal, or inputs of other widths.
    Source: bridging §1.2; notes §4.1, §4.4, §4.5.

    ``bias`` is added to the scores: an array, or a function of the positions of queries and keys. ``dropout`` is the
    rate of `attention-dropout`, where ``rng`` is given. ``turn(heads, positions)`` rotates queries and keys (`minillm.nn.positions`); ``qk_norm`` divides both by their root
    mean square, per head and with gains. With a cache, x holds the new positions only; a `CrossCache` is
    filled by the first call, from ``memory``, and read from then on.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        rng: np.random.Generator,
        *,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        d_memory: int | None = None,
        causal: bool = False,
        window: int | None = None,
        scale: float | None = None,
        bias: bool = False,
        bias_out: bool | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        turn: Any = None,
        dropout: float = 0.0,
        std: float = INIT_STD,
        std_out: float | None = None,
    ):
        where = "MultiHeadAttention"
        require_positive(d_model, where, "d_model", integer=True)
        require_positive(n_heads, where, "n_heads", integer=True)
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        require_positive(n_kv_heads, where, "n_kv_heads", integer=True)
        require(n_heads % n_kv_heads == 0, where, "n_kv_heads", f"a divisor of n_heads = {n_heads}", n_kv_heads)
        if d_head is None:
            require(d_model % n_heads == 0, where, "n_heads", f"a divisor of d_model = {d_model}", n_heads)
            d_head = d_model // n_heads
        require_positive(d_head, where, "d_head", integer=True)
        require(window is None or causal, where, "window", "left out without causal=True", window)
        self.d_model, self.n_heads, self.n_kv_heads, self.d_head = d_model, n_heads, n_kv_heads, d_head
        check_rate(where, dropout)
        self.causal, self.window, self.scale, self.turn, self.norm_eps = causal, window, scale, turn, norm_eps
        self.dropout = dropout
        self.d_memory = d_model if d_memory is None else d_memory

        def weight(d_out: int, d_in: int, spread: float) -> Tensor:
            return parameter(rng.normal(0.0, spread, size=(d_out, d_in)))

        def shift(d_out: int, wanted: bool) -> Tensor | None:
            return parameter(np.zeros(d_out)) if wanted else None

        d_q, d_kv = n_heads * d_head, n_kv_heads * d_head
        self.w_q, self.b_q = weight(d_q, d_model, std), shift(d_q, bias)
        self.w_k, self.b_k = weight(d_kv, self.d_memory, std), shift(d_kv, bias)
        self.w_v, self.b_v = weight(d_kv, self.d_memory, std), shift(d_kv, bias)
        self.w_out = weight(d_model, d_q, std if std_out is None else std_out)
        self.b_out = shift(d_model, bias if bias_out is None else bias_out)
        self.q_gain = parameter(np.ones(d_head)) if qk_norm else None
        self.k_gain = parameter(np.ones(d_head)) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        keep: np.ndarray | None = None,
        bias: Any = None,
        positions: np.ndarray | None = None,
        cache: Any = None,
        rng: np.random.Generator | None = None,
    ) -> Tensor:
        if positions is None:
            start = cache.length if cache is not None and memory is None else 0
            positions = np.arange(start, start + x.shape[1])
        q, k, v = self.project(x, memory, positions, cache)
        if callable(bias):  # of positions that only the cache knows: a ring keeps its keys in an order of its own
            bias = bias(positions, np.arange(k.shape[2]) if cache is None else cache.key_positions)
        pattern: dict[str, Any] = {"causal": self.causal, "window": self.window}
        if cache is not None and memory is None and self.causal:
            keep = self._seen_through(cache, x.shape[1], keep)
            pattern = {}
        context = self.mix(q, k, v, keep, bias, pattern, rng)  # (B, H, L, d_head)
        B, H, L, d_head = context.shape
        return linear(context.transpose(1, 2).reshape(B, L, H * d_head), self.w_out, self.b_out)  # (B, L, d_model)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Any, bias: Any, pattern: dict, rng: Any = None) -> Tensor:
        """Contexts (B, H, L_q, d_head); with a generator, some weights are dropped."""
        if rng is None or not self.dropout:
            return scaled_dot_product_attention(q, k, v, keep, bias, scale=self.scale, **pattern)
        keep = keep_of(q.shape[2], k.shape[2], keep, pattern.get("causal", False), pattern.get("window"))
        dropped = draw_dropped((*q.shape[:3], k.shape[2]), self.dropout, rng)
        return attention_with_dropout(q, k, v, keep, rate=self.dropout, dropped=dropped, bias=bias, scale=self.scale)

    def project(
        self, x: Tensor, memory: Tensor | None = None, positions: np.ndarray | None = None, cache: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, d_head) and all keys and values (B, H_kv, S, d_head), turned, and through the cache."""
        where = "MultiHeadAttention"
        require(x.ndim == 3 and x.shape[-1] == self.d_model, where, "x", f"of shape (B, L, {self.d_model})", x)
        if memory is not None:
            fits = memory.ndim == 3 and memory.shape[0] == x.shape[0] and memory.shape[-1] == self.d_memory
            require(fits, where, "memory", f"of shape (B={x.shape[0]}, S, {self.d_memory})", memory)
        if positions is None:
            start = cache.length if cache is not None and memory is None else 0
            positions = np.arange(start, start + x.shape[1])
        q = self._heads(x, self.w_q, self.b_q, self.q_gain, positions)
        if memory is not None and cache is not None and cache.filled:
            return q, *cache.read()
        source = x if memory is None else memory
        at = positions if memory is None else np.arange(memory.shape[1])
        k = self._heads(source, self.w_k, self.b_k, self.k_gain, at)
        v = self._heads(source, self.w_v, self.b_v)
        if cache is not None:
            k, v = cache.append(k, v) if memory is None else cache.store(k, v)
        return q, k, v

    def _heads(self, x: Tensor, weight: Tensor, shift: Tensor | None, gain=None, positions=None) -> Tensor:
        """A projection cut into heads, (B, heads, L, d_head), with its norm and its rotation."""
        B, L, _ = x.shape
        heads = linear(x, weight, shift).reshape(B, L, -1, self.d_head)
        if gain is not None:
            heads = rms_norm(heads, gain, eps=self.norm_eps)
        heads = heads.transpose(1, 2)
        return heads if self.turn is None or positions is None else self.turn(heads, positions)

    def _seen_through(self, cache: Any, n_new: int, keep: np.ndarray | None) -> np.ndarray | None:
        """Which cached keys (L_new, S) the new queries may look at: their own past, as far as the window goes."""
        own = np.arange(cache.length - n_new, cache.length)[:, None]
        distance = own - cache.key_positions
        if n_new == 1 and self.window is None:
            return keep
        seen = (distance >= 0) & (distance < (cache.length if self.window is None else self.window))
        return seen if keep is None else seen & keep

    def new_cache(self, batch: int, capacity: int, dtype: Any = np.float32) -> LayerCache | WindowCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens; with a window, a ring of that size."""
        if self.window is not None:
            return WindowCache(batch, self.n_kv_heads, self.window, self.d_head, dtype=dtype)
        return LayerCache(batch, self.n_kv_heads, capacity, self.d_head, dtype=dtype)
