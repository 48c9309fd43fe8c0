r"""Attention as written: scores, weights, context; multi-head, grouped and rotary."""

from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, where
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.masks import causal_mask
from minillm.functional.positions import rope, rotation_angles


def _example_scores(rng):
    L_q, L_k = [(3, 3), (1, 4), (2, 1)][rng.integers(3)]
    return (rng.normal(size=(2, 2, L_q, 3)), rng.normal(size=(2, 2, L_k, 3))), {}


def check_attention(q, k, v) -> int:
    """Refuse queries, keys and values that do not belong together; return query heads per key head."""
    name = "scaled_dot_product_attention"
    require(q.ndim == 4, name, "q", "of shape (B, H, L_q, d_head)", q)
    require(k.ndim == 4 and k.shape[0] == q.shape[0], name, "k", f"of shape (B={q.shape[0]}, H_kv, L_k, d_head)", k)
    require(k.shape[-1] == q.shape[-1], name, "the width of k", f"that of q, {q.shape[-1]}", k)
    require(v.shape[:-1] == k.shape[:-1], name, "v", f"of shape {(*k.shape[:-1], 'd_v')}", v)
    divides = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    require(divides, name, "H_kv", f"a divisor of H = {q.shape[1]}", f"{k.shape[1]}")
    return q.shape[1] // k.shape[1]


@written("repeat_heads", example=lambda rng: ((rng.normal(size=(2, 2, 3, 2)), int(rng.integers(1, 4))), {}))
def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Give every query head its key/value head: head h reads group h // times."""
    require(x.ndim == 4, "repeat_heads", "x", "of shape (B, H_kv, L, d_head)", x)
    if times == 1:
        return x
    B, H_kv, L, d = x.shape
    return x.unsqueeze(2).expand(B, H_kv, times, L, d).reshape(B, H_kv * times, L, d)


@written("scaled_scores", example=_example_scores)
def scaled_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    r"""Scaled inner products of queries and keys.

    Equation: `scaled-dot-product` $\mathbf S=\frac{\mathbf Q\mathbf K^\top}{\sqrt{d_{\rm head}}}$, the mask comes with the weights
    Equation: `score-variance` $\mathrm{Var}\langle q,k\rangle=d_{\rm head}s_q^2s_k^2$, hence the root
    Shapes: q (B, H, L_q, d_head), k (B, H, L_k, d_head) -> (B, H, L_q, L_k)
    Source: bridging §1.1; notes §4.1.
    Differs: the root is of the head's width, not the model's (erratum 20); ``scale`` replaces it (T5: 1).
    """
    return (q @ k.T) * float(1.0 / np.sqrt(q.shape[-1]) if scale is None else scale)


def _example_weights(rng):
    keep = rng.random((3, 4)) < 0.7
    keep[0] = False
    return (rng.normal(size=(2, 2, 3, 4)),), {"keep": keep}


@written("attention_weights", example=_example_weights)
def attention_weights(scores: Tensor, keep: np.ndarray | None = None) -> Tensor:
    r"""Softmax over the keys that a query may see; a query that sees none gets weights 0.

    Equation: `attention-weights` $\alpha_{t,s}=\mathrm{softmax}_s(S_{t,\cdot})$
    Shapes: scores (..., L_q, L_k), keep broadcastable to it, true where allowed -> (..., L_q, L_k)
    Raises: ValueError if the mask does not broadcast to the scores.
    Source: bridging §1.1; notes §4.1.
    """
    if keep is None:
        keep = np.ones(scores.shape[-2:], dtype=bool)
    try:
        keep = np.broadcast_to(keep, scores.shape)
    except ValueError:
        require(False, "attention_weights", "the mask", f"broadcastable to {scores.shape}", keep)
    top = np.where(keep, scores.data, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0).astype(scores.dtype)
    e = where(keep, where(keep, scores - top, 0.0).exp(), 0.0)
    total = e.sum(-1, keepdims=True)
    return e / where(total.data == 0, 1.0, total)


def _example(rng):
    H, H_kv = [(2, 2), (4, 2), (3, 1)][rng.integers(3)]
    L_q, L_k = [(4, 4), (2, 5), (1, 4), (5, 3)][rng.integers(4)]
    arrays = rng.normal(size=(2, H, L_q, 3)), rng.normal(size=(2, H_kv, L_k, 3)), rng.normal(size=(2, H_kv, L_k, 2))
    one_hidden = np.arange(L_k) != rng.integers(L_k, size=(2, H, L_q, 1))
    keep = [None, one_hidden[:, :1], one_hidden[0]][rng.integers(3)]
    bias = [None, rng.normal(size=(H, L_q, L_k)), rng.normal(size=(2, 1, 1, L_k))][rng.integers(3)]
    shape = [{}, {"causal": True}, {"causal": True, "window": int(rng.integers(3, 5))}][rng.integers(3)]
    return (*arrays, keep, bias), {**shape, "scale": [None, 0.5][rng.integers(2)]}


def check_pattern(name: str, L_q: int, L_k: int, keep, bias, H: int, B: int, causal: bool, window: int | None) -> None:
    """Refuse a mask, bias or window that does not fit the scores (B, H, L_q, L_k)."""
    if window is not None:
        require(causal, name, "window", "left out without causal=True (a window looks back)", window)
        require_positive(window, name, "window", integer=True)
    for what, given in (("the mask", keep), ("the bias", bias)):
        if given is None:
            continue
        full, shape = (B, H, L_q, L_k), tuple(given.shape)
        fits = len(shape) <= 4 and all(n in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False))
        require(fits, name, what, f"broadcastable to (B, H, L_q, L_k) = {full}", given)
    if keep is not None:
        require(keep.dtype == bool, name, "the mask", "boolean, true where attention is allowed", keep)


def keep_of(L_q: int, L_k: int, keep: np.ndarray | None, causal: bool, window: int | None) -> np.ndarray | None:
    """The mask that a pattern and a given mask amount to together."""
    if not causal:
        return keep
    distance = (np.arange(L_q)[:, None] + L_k - L_q) - np.arange(L_k)  # (L_q, L_k)
    seen = (distance >= 0) & (distance < (L_q + L_k if window is None else window))
    return seen if keep is None else seen & keep


@written("scaled_dot_product_attention", example=_example)
def scaled_dot_product_attention(
    q: Float[Tensor, "B H L_q d"],
    k: Float[Tensor, "B H_kv L_k d"],
    v: Float[Tensor, "B H_kv L_k d_v"],
    keep: Any = None,
    bias: Any = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""Weigh the values by how well the keys answer the queries.

    Equation: `attention-context` $\mathbf c_t^{(h)}=\sum_s\alpha^{(h)}_{t,s}\mathbf V^{(h)}_s$
    Equation: `gqa` $\mathbf S_h=\mathbf Q_h\mathbf K_{g(h)}^\top/\sqrt{d_{\rm head}}+\mathbf M,\ g(h)=\lfloor hH_{kv}/H\rfloor$
    Equation: `mqa` the same with $H_{kv}=1$
    Shapes: q (B, H, L_q, d_head), k (B, H_kv, L_k, d_head), v (B, H_kv, L_k, d_v), keep and bias broadcastable to
        (B, H, L_q, L_k) -> (B, H, L_q, d_v). ``causal`` aligns the last query with the last key (as with a cache);
        with it, ``window`` keeps the last so many keys up to the query's own.
    Raises: ValueError if the shapes do not belong together or H_kv does not divide H.
    Source: bridging §1.2; notes §4.1, §4.2, §4.4.
    Differs: groups are counted from 0 (erratum 23); a query that sees nothing gets 0.
    """
    times = check_attention(q, k, v)
    B, H, L_q, _ = q.shape
    check_pattern("scaled_dot_product_attention", L_q, k.shape[2], keep, bias, H, B, causal, window)
    scores = scaled_scores(q, repeat_heads(k, times), scale)  # (B, H, L_q, L_k)
    if bias is not None:
        scores = scores + bias
    weights = attention_weights(scores, keep_of(L_q, k.shape[2], keep, causal, window))
    return weights @ repeat_heads(v, times)


def check_rotary(qkv, angles, H: int, H_kv: int, pairing: str) -> int:
    """Refuse a joint projection whose width is not that of its heads; return d_head."""
    name = "rotary_attention"
    require(H > 0 and H_kv > 0 and H % H_kv == 0, name, "H_kv", f"a positive divisor of H = {H}", f"{H_kv}")
    heads = H + 2 * H_kv
    require(
        qkv.ndim == 3 and qkv.shape[-1] % heads == 0,
        name,
        "qkv",
        f"of shape (B, L, (H + 2 H_kv) d_head) with H + 2 H_kv = {heads}",
        qkv,
    )
    d_head = qkv.shape[-1] // heads
    wanted = (qkv.shape[1], d_head // 2)
    require(angles.shape == wanted, name, "the angles", f"of shape (L, d_head / 2) = {wanted}", angles)
    return d_head


def _example_rotary(rng):
    H, H_kv = [(2, 2), (4, 2), (2, 1)][rng.integers(3)]
    L = int(rng.integers(1, 6))
    angles = rotation_angles(np.arange(L), 4, 100.0)
    qkv = rng.normal(size=(2, L, (H + 2 * H_kv) * 4))
    how = {"pairing": ["interleaved", "half"][rng.integers(2)], "scale": [None, 0.7][rng.integers(2)]}
    return (qkv,), {"angles": angles, "H": H, "H_kv": H_kv, **how}


@written("rotary_attention", example=_example_rotary)
def rotary_attention(
    qkv: Float[Tensor, "B L width"],
    angles: Float[np.ndarray, "L half"],
    *,
    H: int,
    H_kv: int,
    pairing: str = "interleaved",
    scale: float | None = None,
) -> Float[Tensor, "B L H_d_head"]:
    r"""Causal self-attention of a decoder block, from the joint projection to the merged heads.

    Equation: `mha` $\mathrm{Concat}_h(\mathrm{softmax}(\mathbf S_h)\mathbf V_h)$, before the output projection
    Shapes: qkv (B, L, (H + 2 H_kv) d_head) = [queries; keys; values], angles (L, d_head / 2) -> (B, L, H d_head)
    Raises: ValueError if the width is not a multiple of H + 2 H_kv, or the angles do not fit.
    Source: bridging §1.2; notes §4.1, §4.4, §6.

    ``scale`` multiplies the scores; left out, it is $1/\sqrt{d_{\rm head}}$.
    """
    d_head = check_rotary(qkv, angles, H, H_kv, pairing)
    B, L, _ = qkv.shape
    heads = qkv.reshape(B, L, H + 2 * H_kv, d_head).transpose(1, 2)  # (B, H + 2 H_kv, L, d_head)
    q = rope(heads[:, :H], angles, pairing)
    k = rope(heads[:, H : H + H_kv], angles, pairing)
    context = scaled_dot_product_attention(q, k, heads[:, H + H_kv :], causal_mask(L), scale=scale)
    return context.transpose(1, 2).reshape(B, L, H * d_head)
