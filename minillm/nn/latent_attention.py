r"""DeepSeek's multi-head latent attention as a module: unpacked heads in training, absorbed weights at decoding."""

from typing import Any

import numpy as np

from minillm.autograd import Tensor, cat
from minillm.checks import require, require_one_of, require_positive
from minillm.functional.attention import causal_mask
from minillm.functional.positions import PAIRINGS, rotation_angles
from minillm.fused.attention import scaled_dot_product_attention
from minillm.fused.latent_attention import cached_latent_attention
from minillm.fused.linear import linear
from minillm.fused.positions import rope
from minillm.nn.latent_cache import LatentCache
from minillm.nn.layers import INIT_STD, RMSNorm
from minillm.nn.module import Module, parameter


class LatentAttention(Module):
    r"""Causal self-attention whose keys and values are made from one narrow latent a token.

    Maps that read the same input are one matrix: $[\mathbf W^{DKV};\mathbf W^{KR}]$ ``w_down_kv``, and per head
    $[\mathbf W^{UQ};\mathbf W^{QR}]$ ``w_up_q`` and $[\mathbf W^{UK};\mathbf W^{UV}]$ ``w_up_kv``. Without ``d_q`` the
    queries come from the stream itself.

    Equation: `mla-deepseek` $\mathbf c^{KV}_t=\mathbf h_t\mathbf W^{DKV}$, $\mathbf K^C=\mathbf c^{KV}\mathbf W^{UK}$, $\mathbf V^C=\mathbf c^{KV}\mathbf W^{UV}$
    Equation: `mla-decoupled-rope` $\mathbf q_t=[\mathbf q^C_t;\mathbf q^R_t]$, $\mathbf k_t=[\mathbf k^C_t;\mathbf k^R_t]$, one $\mathbf k^R$ for all heads
    Equation: `mla-absorb` with a cache, queries are carried to the latents
    Shapes: (B, L, d_model) -> (B, L, d_model)
    Raises: ValueError for sizes that are not positive, an odd d_R, an unknown pairing, a memory, or x of another width.
    Source: deepseek (the slides on latent attention); DeepSeek-AI 2024 (V2, V3).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        d_c: int,
        d_R: int,
        rng: np.random.Generator,
        *,
        d_q: int | None = None,
        d_v: int | None = None,
        latent_norm: bool = True,
        rope_base: float = 10_000.0,
        pairing: str = "interleaved",
        norm_eps: float = 1e-6,
        std: float = INIT_STD,
        std_out: float = INIT_STD,
    ):
        d_v = d_head if d_v is None else d_v
        sizes = {"d_model": d_model, "n_heads": n_heads, "d_head": d_head, "d_c": d_c, "d_R": d_R, "d_v": d_v}
        for name, value in sizes.items() if d_q is None else (sizes | {"d_q": d_q}).items():
            require_positive(value, "LatentAttention", name, integer=True)
        require(d_R % 2 == 0, "LatentAttention", "d_R", "even (rotary positions turn pairs)", d_R)
        require_one_of(pairing, PAIRINGS, "LatentAttention", "pairing")
        self.d_model, self.n_heads, self.d_head, self.d_c, self.d_R, self.d_v = d_model, n_heads, d_head, d_c, d_R, d_v
        self.rope_base, self.pairing = rope_base, pairing

        def matrix(d_out: int, d_in: int, spread: float = std) -> Tensor:
            return parameter(rng.normal(0.0, spread, size=(d_out, d_in)))

        self.w_down_q = None if d_q is None else matrix(d_q, d_model)
        self.q_norm = RMSNorm(d_q, norm_eps) if latent_norm and d_q is not None else None
        self.w_up_q = matrix(n_heads * (d_head + d_R), d_q or d_model)
        self.w_down_kv = matrix(d_c + d_R, d_model)
        self.kv_norm = RMSNorm(d_c, norm_eps) if latent_norm else None
        self.w_up_kv = matrix(n_heads * (d_head + d_v), d_c)
        self.w_out = matrix(d_model, n_heads * d_v, std_out)

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        keep: np.ndarray | None = None,
        bias: np.ndarray | Tensor | None = None,
        positions: np.ndarray | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        require(memory is None, "LatentAttention", "the memory", "None (its latents are those of x itself)", memory)
        require(x.ndim == 3 and x.shape[2] == self.d_model, "LatentAttention", "x", f"(B, L, {self.d_model})", x)
        B, L, _ = x.shape
        start = 0 if cache is None else cache.length
        positions = np.arange(start, start + L) if positions is None else positions
        angles = rotation_angles(positions, self.d_R, self.rope_base)
        q_c, q_r = self._queries(x, angles)  # (B, H, L, d_head), (B, H, L, d_R)
        down = linear(x, self.w_down_kv)  # (B, L, d_c + d_R)
        c, k_r = down[..., : self.d_c], rope(down[..., self.d_c :], angles, self.pairing)
        c = c if self.kv_norm is None else self.kv_norm(c)
        if cache is None:
            out = self._unpacked(q_c, q_r, c, k_r, keep, bias)
        else:
            all_c, all_k_r = cache.append(c, k_r)
            if self.unpacking_is_cheaper(L, cache.length):
                out = self._unpacked(q_c, q_r, all_c, all_k_r, keep, bias)
            else:
                own_past = causal_mask(L, cache.length) if L > 1 else None
                keep = own_past if keep is None else keep if own_past is None else keep & own_past
                out = cached_latent_attention(q_c, q_r, cache.filled, self.w_up_kv, keep, bias)  # (B, L, H, d_v)
        return linear(out.reshape(B, L, self.n_heads * self.d_v), self.w_out)

    def unpacking_is_cheaper(self, L: int, S: int) -> bool:
        """Whether L new queries over S cached tokens cost fewer products with keys and values made per head.

        Unpacking costs $Sd_c(d_{\rm head}+d_v)$ a head and leaves narrow scores; absorbing costs that for L instead of
        S and leaves scores as wide as the cache. So one new token absorbs, and reading a prompt unpacks.
        """
        per_token = self.d_c * (self.d_head + self.d_v)
        unpacked = S * per_token + L * S * (self.d_head + self.d_R + self.d_v)
        return unpacked < L * per_token + L * S * (2 * self.d_c + self.d_R)

    def _queries(self, x: Tensor, angles: np.ndarray) -> tuple[Tensor, Tensor]:
        """Content and rotary parts per head."""
        if self.w_down_q is not None:
            x = linear(x, self.w_down_q)  # (B, L, d_q)
            x = x if self.q_norm is None else self.q_norm(x)
        B, L, _ = x.shape
        q = linear(x, self.w_up_q).reshape(B, L, self.n_heads, self.d_head + self.d_R).transpose(1, 2)
        return q[..., : self.d_head], rope(q[..., self.d_head :], angles, self.pairing)

    def _unpacked(self, q_c, q_r, c, k_r, keep, bias) -> Tensor:
        """The form for training: keys and values of every head, then attention as usual."""
        (B, H, _, _), S = q_c.shape, c.shape[1]
        kv = linear(c, self.w_up_kv).reshape(B, S, H, self.d_head + self.d_v).transpose(1, 2)
        k = cat([kv[..., : self.d_head], k_r.unsqueeze(1).expand(B, H, S, self.d_R)], axis=-1)
        q = cat([q_c, q_r], axis=-1)  # (B, H, L, d_head + d_R)
        out = scaled_dot_product_attention(q, k, kv[..., self.d_head :], keep, bias, causal=True)  # (B, H, L, d_v)
        return out.transpose(1, 2)  # (B, L, H, d_v)

    def new_cache(self, batch: int, capacity: int, dtype: Any = np.float32) -> LatentCache:
        """An empty cache of latents for ``batch`` sequences of up to ``capacity`` tokens."""
        return LatentCache(batch, capacity, self.d_c, self.d_R, dtype)
