r"""Causal self-attention with grouped keys and values, rotary positions and a cache."""

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require, require_one_of, require_positive
from minillm.functional.positions import PAIRINGS
from minillm.fused.attention import cached_attention, rotary_attention
from minillm.fused.linear import linear
from minillm.nn.cache import KVCache
from minillm.nn.layers import INIT_STD
from minillm.nn.module import Module, parameter


class CausalSelfAttention(Module):
    r"""Multi-head causal self-attention, H query heads over H_kv key/value heads.

    Equation: `mha` $\mathrm{Concat}_h(\mathrm{softmax}(\mathbf S_h)\mathbf V_h)\mathbf W_O$
    Equation: `gqa` $g(h)=\lfloor hH_{kv}/H\rfloor$
    Equation: `qkv-projection` $\mathbf Q,\mathbf K,\mathbf V=\mathbf X\mathbf W_q,\mathbf X\mathbf W_k,\mathbf X\mathbf W_v$, one joint map
    Shapes: (B, L, d_model) -> (B, L, d_model)
    Raises: ValueError for heads that do not divide, heads of an odd width, or an unknown pairing.
    Source: bridging §1.2; notes §4.1, §4.4.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        pairing: str,
        rng: np.random.Generator,
        std: float = INIT_STD,
        std_out: float = INIT_STD,
        scale: float | None = None,
    ):
        where = "CausalSelfAttention"
        for name, value in {"d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads}.items():
            require_positive(value, where, name, integer=True)
        fits = d_model % (2 * n_heads) == 0
        wanted = "an even integer (rotary positions turn pairs)"
        require(fits, where, "d_model / n_heads", wanted, f"{d_model} / {n_heads}")
        require(n_heads % n_kv_heads == 0, where, "n_kv_heads", f"a divisor of n_heads = {n_heads}", n_kv_heads)
        require_one_of(pairing, PAIRINGS, where, "pairing")
        self.n_heads, self.n_kv_heads, self.pairing, self.scale = n_heads, n_kv_heads, pairing, scale
        d_head = d_model // n_heads
        self.w_qkv = parameter(rng.normal(0.0, std, size=((n_heads + 2 * n_kv_heads) * d_head, d_model)))
        self.w_out = parameter(rng.normal(0.0, std_out, size=(d_model, d_model)))

    def forward(self, x: Tensor, angles: np.ndarray, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        qkv = linear(x, self.w_qkv)  # (B, L, (H + 2 H_kv) d_head)
        heads = {"H": self.n_heads, "H_kv": self.n_kv_heads, "pairing": self.pairing, "scale": self.scale}
        if cache is None:
            context = rotary_attention(qkv, angles=angles, **heads)  # (B, L, d_model)
        else:
            context = cached_attention(qkv, angles, cache, layer, **heads)  # (B, L, d_model)
        return linear(context, self.w_out)
