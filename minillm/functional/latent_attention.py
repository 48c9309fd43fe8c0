r"""DeepSeek's multi-head latent attention as written: low-rank keys and values, rotary part apart, absorbed weights.

The name has two meanings (erratum 24). Here a token's keys and values are squeezed into one narrow vector, which
makes the *cache* narrow; an array of learned latents, which makes the *sequence* short, is Perceiver's.

Weights are stored (d_out, d_in), so the equations' $\mathbf h\mathbf W$ is $\mathbf h\mathbf W^\top$ in code. Per head the
rows of a matrix lie together: $\mathbf W^{UK}$ is (H d_head, d_c), head h in rows h d_head to (h + 1) d_head.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, cat
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.attention import attention_weights, causal_mask, scaled_dot_product_attention
from minillm.functional.linear_algebra import split_heads
from minillm.functional.norms import rms_norm
from minillm.functional.positions import rope, rotation_angles


class Latents(NamedTuple):
    """What is cached of a token: the latent (B, L, d_c), and one rotary key (B, L, d_R) for all heads."""

    c: Float[Tensor, "B L d_c"]
    k_r: Float[Tensor, "B L d_R"]


def check_heads(where: str, **widths: tuple[int, int]) -> None:
    """Refuse widths that H heads cannot share."""
    for name, (width, H) in widths.items():
        fits = H > 0 and width % H == 0
        require(fits, where, f"the rows of {name}", f"a multiple of H = {H}", f"{width}")


def check_map(where: str, name: str, w, d_in: int) -> None:
    """Refuse a weight that is not (d_out, d_in)."""
    require(w.ndim == 2 and w.shape[1] == d_in, where, name, f"of shape (d_out, {d_in})", w)


def _example_compress(rng):
    B, L, d, d_c, d_R = [(2, 3, 6, 3, 2), (1, 1, 4, 2, 4)][rng.integers(2)]
    h, w_dkv, w_kr = rng.normal(size=(B, L, d)), rng.normal(size=(d_c, d)), rng.normal(size=(d_R, d))
    g = [None, rng.normal(size=d_c)][rng.integers(2)]
    return (h, w_dkv, w_kr) if g is None else (h, w_dkv, w_kr, g), {"angles": rotation_angles(np.arange(L), d_R, 100.0)}


@written("compress_latents", example=_example_compress)
def compress_latents(
    h: Float[Tensor, "B L d"],
    w_dkv: Float[Tensor, "d_c d"],
    w_kr: Float[Tensor, "d_R d"],
    g: Float[Tensor, " d_c"] | None = None,
    *,
    angles: Float[np.ndarray, "L half"],
    pairing: str = "interleaved",
    eps: float = 1e-6,
) -> Latents:
    r"""Squeeze every token into the vector that is cached, beside one rotary key that all heads share.

    Equation: `mla-deepseek` $\mathbf c^{KV}_t=\mathbf h_t\mathbf W^{DKV}$, with an optional RMSNorm
    Equation: `mla-decoupled-rope` $\mathbf k^R_t=\mathrm{RoPE}(\mathbf h_t\mathbf W^{KR})$
    Shapes: h (B, L, d), w_dkv (d_c, d), w_kr (d_R, d), g (d_c,) -> c (B, L, d_c), k_r (B, L, d_R)
    Raises: ValueError if a width does not fit or d_R is odd.
    Source: deepseek (the slides on latent attention); DeepSeek-AI 2024 (V2).
    """
    for name, w in (("w_dkv", w_dkv), ("w_kr", w_kr)):
        check_map("compress_latents", name, w, h.shape[-1])
    c = h @ w_dkv.T  # (B, L, d_c)
    return Latents(c if g is None else rms_norm(c, g, eps), rope(h @ w_kr.T, angles, pairing))


class LatentQueries(NamedTuple):
    """Queries of content (B, H, L, d_head) and of position (B, H, L, d_R)."""

    q_c: Float[Tensor, "B H L d_head"]
    q_r: Float[Tensor, "B H L d_R"]


def _example_queries(rng):
    B, L, H, d_q, d_R = [(2, 3, 2, 5, 2), (1, 1, 3, 4, 4)][rng.integers(2)]
    arrays = (rng.normal(size=(B, L, d_q)), rng.normal(size=(H * 3, d_q)), rng.normal(size=(H * d_R, d_q)))
    return arrays, {"H": H, "angles": rotation_angles(np.arange(L), d_R, 100.0)}


@written("latent_queries", example=_example_queries)
def latent_queries(
    c_q: Float[Tensor, "B L d_q"],
    w_uq: Float[Tensor, "H_d_head d_q"],
    w_qr: Float[Tensor, "H_d_R d_q"],
    *,
    H: int,
    angles: Float[np.ndarray, "L half"],
    pairing: str = "interleaved",
) -> LatentQueries:
    r"""Queries from their own latent: a part for content and a rotary part, both per head.

    Equation: `mla-deepseek` $\mathbf Q^C=\mathbf c^Q\mathbf W^{UQ}$, $\mathbf c^Q_t=\mathbf h_t\mathbf W^{DQ}$ (or $\mathbf h_t$ itself)
    Equation: `mla-decoupled-rope` $\mathbf q_t=[\mathbf q^C_t;\mathrm{RoPE}(\mathbf c^Q_t\mathbf W^{QR})]$
    Shapes: c_q (B, L, d_q), w_uq (H d_head, d_q), w_qr (H d_R, d_q) -> q_c (B, H, L, d_head), q_r (B, H, L, d_R)
    Raises: ValueError if a width does not fit, is no multiple of H, or d_R is odd.
    Source: deepseek (the slides on latent attention).
    """
    for name, w in (("w_uq", w_uq), ("w_qr", w_qr)):
        check_map("latent_queries", name, w, c_q.shape[-1])
    check_heads("latent_queries", w_uq=(len(w_uq), H), w_qr=(len(w_qr), H))
    return LatentQueries(split_heads(c_q @ w_uq.T, H), rope(split_heads(c_q @ w_qr.T, H), angles, pairing))


def _example_attention(rng):
    B, H, L_q, L_k, d_c, d_R = [(2, 2, 3, 3, 4, 2), (1, 3, 1, 4, 2, 4), (2, 1, 2, 3, 3, 2)][rng.integers(3)]
    arrays = [rng.normal(size=(B, H, L_q, 3)), rng.normal(size=(B, H, L_q, d_R))]
    arrays += [rng.normal(size=(B, L_k, d_c)), rng.normal(size=(B, L_k, d_R))]
    arrays += [rng.normal(size=(H * 3, d_c)), rng.normal(size=(H * 2, d_c))]
    return tuple(arrays), {"keep": [None, causal_mask(L_q, L_k)][rng.integers(2)]}


def check_latent_attention(where: str, q_c, q_r, c, k_r, w_uk, w_uv) -> None:
    """Refuse queries, latents and weights that do not belong together."""
    require(q_c.ndim == 4, where, "q_c", "of shape (B, H, L_q, d_head)", q_c)
    B, H, L_q, d_head = q_c.shape
    require(q_r.shape[:3] == (B, H, L_q), where, "q_r", f"of shape {(B, H, L_q, 'd_R')}", q_r)
    require(c.ndim == 3 and len(c) == B, where, "c", f"of shape (B={B}, L_k, d_c)", c)
    wanted = (*c.shape[:2], q_r.shape[3])
    require(k_r.shape == wanted, where, "k_r", f"of shape {wanted}, one key for all heads", k_r)
    for name, w in (("w_uk", w_uk), ("w_uv", w_uv)):
        check_map(where, name, w, c.shape[2])
    require(len(w_uk) == H * d_head, where, "w_uk", f"of H d_head = {H * d_head} rows", w_uk)
    check_heads(where, w_uv=(len(w_uv), H))


@written("latent_attention", example=_example_attention)
def latent_attention(
    q_c: Float[Tensor, "B H L_q d_head"],
    q_r: Float[Tensor, "B H L_q d_R"],
    c: Float[Tensor, "B L_k d_c"],
    k_r: Float[Tensor, "B L_k d_R"],
    w_uk: Float[Tensor, "H_d_head d_c"],
    w_uv: Float[Tensor, "H_d_v d_c"],
    keep: np.ndarray | None = None,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""The form for training: unpack keys and values of every head, then attend as usual.

    Equation: `mla-deepseek` $\mathbf K^C=\mathbf c^{KV}\mathbf W^{UK}$, $\mathbf V^C=\mathbf c^{KV}\mathbf W^{UV}$, $\mathrm{softmax}(\mathbf S_h)\mathbf V^C_h$
    Equation: `mla-decoupled-rope` $\mathbf k_t=[\mathbf k^C_t;\mathbf k^R_t]$, scale $1/\sqrt{d_{\rm head}+d_R}$
    Shapes: q_c (B, H, L_q, d_head), q_r (B, H, L_q, d_R), c (B, L_k, d_c), k_r (B, L_k, d_R), w_uk (H d_head, d_c),
        w_uv (H d_v, d_c), keep broadcastable to (B, H, L_q, L_k) -> (B, H, L_q, d_v)
    Raises: ValueError if the shapes do not belong together.
    Source: deepseek (the slides on latent attention).
    """
    check_latent_attention("latent_attention", q_c, q_r, c, k_r, w_uk, w_uv)
    B, H, _, _ = q_c.shape
    L_k, d_R = k_r.shape[1:]
    k_c, v = split_heads(c @ w_uk.T, H), split_heads(c @ w_uv.T, H)  # (B, H, L_k, d_head), (B, H, L_k, d_v)
    shared = k_r.unsqueeze(1).expand(B, H, L_k, d_R)
    return scaled_dot_product_attention(cat([q_c, q_r], axis=-1), cat([k_c, shared], axis=-1), v, keep)


@written("absorbed_latent_attention", example=_example_attention)
def absorbed_latent_attention(
    q_c: Float[Tensor, "B H L_q d_head"],
    q_r: Float[Tensor, "B H L_q d_R"],
    c: Float[Tensor, "B L_k d_c"],
    k_r: Float[Tensor, "B L_k d_R"],
    w_uk: Float[Tensor, "H_d_head d_c"],
    w_uv: Float[Tensor, "H_d_v d_c"],
    keep: np.ndarray | None = None,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""The form for decoding: carry the queries into the space of the latents and attend to the cache itself.

    Keys and values of single heads are never made: $q^\top(\mathbf W_h^{UK\top}c)=(\mathbf W_h^{UK}q)^\top c$, and the
    weighted sum of latents passes through $\mathbf W^{UV}_h$ once a query instead of once a key.

    Equation: `mla-absorb` per head $q^\top(\mathbf W_h^{UK\top}c)=(\mathbf W_h^{UK}q)^\top c$, $\sum_s\alpha_sc_s\mathbf W_h^{UV}=(\sum_s\alpha_sc_s)\mathbf W_h^{UV}$
    Equation: `mla-decoupled-rope` only the content part is absorbed; the rotary scores are added
    Shapes: as `latent_attention`
    Raises: ValueError if the shapes do not belong together.
    Source: deepseek (the slides on latent attention).
    """
    check_latent_attention("absorbed_latent_attention", q_c, q_r, c, k_r, w_uk, w_uv)
    H, d_head, d_c = q_c.shape[1], q_c.shape[3], c.shape[2]
    per_head = w_uk.reshape(H, d_head, d_c)
    q_latent = q_c @ per_head  # (B, H, L_q, d_c)
    all_heads, shared = c.unsqueeze(1), k_r.unsqueeze(1)  # (B, 1, L_k, d)
    scale = 1.0 / float(np.sqrt(d_head + q_r.shape[3]))
    weights = attention_weights((q_latent @ all_heads.T + q_r @ shared.T) * scale, keep)
    context = weights @ all_heads  # (B, H, L_q, d_c)
    return context @ w_uv.reshape(H, -1, d_c).T


def _example_output(rng):
    return (rng.normal(size=(4, 3)), rng.normal(size=(5, 4))), {"H": [1, 2][rng.integers(2)]}


@written("absorb_output", example=_example_output)
def absorb_output(
    w_uv: Float[Tensor, "H_d_v d_c"], w_o: Float[Tensor, "d H_d_v"], *, H: int
) -> Float[Tensor, "H d d_c"]:
    r"""One map per head from the sum of latents to the stream, in place of two.

    Equation: `mla-absorb` $(\sum_s\alpha_sc_s\mathbf W_h^{UV})\mathbf W_{O,h}=(\sum_s\alpha_sc_s)(\mathbf W_h^{UV}\mathbf W_{O,h})$
    Shapes: w_uv (H d_v, d_c), w_o (d, H d_v) -> (H, d, d_c)
    Raises: ValueError if the widths do not fit.
    Source: deepseek (the slides on latent attention).

    It pays only where d_c d is smaller than d_v (d_c + d): at DeepSeek's sizes it does not, and the module keeps both.
    """
    check_heads("absorb_output", w_uv=(len(w_uv), H))
    check_map("absorb_output", "w_o", w_o, len(w_uv))
    d_v, d_c = len(w_uv) // H, w_uv.shape[1]
    per_head = w_o.reshape(len(w_o), H, d_v).transpose(0, 1)  # (H, d, d_v)
    return per_head @ w_uv.reshape(H, d_v, d_c)


def latent_cache_width(d_c: int, d_R: int, H_kv: int, d_head: int) -> tuple[int, int, float]:
    r"""Numbers cached per token and layer: with latents, with keys and values, and their ratio.

    Equation: `mla-cache-size` $d_c+d_R$ against $2H_{kv}d_{\rm head}$
    Raises: ValueError for sizes that are not positive.
    Source: deepseek (the slides on latent attention).
    """
    for name, value in {"d_c": d_c, "d_R": d_R, "H_kv": H_kv, "d_head": d_head}.items():
        require_positive(value, "latent_cache_width", name, integer=True)
    latent, full = d_c + d_R, 2 * H_kv * d_head
    return latent, full, full / latent
