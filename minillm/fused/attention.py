r"""Attention in one piece, with hand-derived gradients and no $L\times L$ memory; `attention_blocks.py` says how.

Equation: `mha` $\mathrm{Concat}_h(\mathrm{softmax}(\mathbf S_h)\mathbf V_h)$
Source: notes §4.1, §4.10.
"""

from typing import Any

import numpy as np

from minillm.autograd import Tensor, is_recording, scratch
from minillm.autograd.operation import derived
from minillm.autograd.tape import wrap
from minillm.functional.attention import check_attention, check_pattern, check_rotary
from minillm.fused import attention_blocks as blocks
from minillm.fused.attention_blocks import Pattern
from minillm.fused.positions import rotate


@derived("scaled_dot_product_attention")
def scaled_dot_product_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keep: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    wanted: tuple[bool, ...] = (),
):
    r"""Weigh the values by how well the keys answer the queries.

    Equation: `attention-context` $\mathbf c_t^{(h)}=\sum_s\alpha^{(h)}_{t,s}\mathbf V^{(h)}_s$
    Equation: `gqa` head h reads key/value head $\lfloor hH_{kv}/H\rfloor$
    Equation: `flash-attention` blocks of queries, the log-normaliser kept and the probabilities made again
    Shapes: q (B, H, L_q, d_head), k (B, H_kv, L_k, d_head), v (B, H_kv, L_k, d_v), keep and bias broadcastable to
        (B, H, L_q, L_k) -> (B, H, L_q, d_v); keeps scaled queries, the output and the log-normalisers (B, H, L_q).
    Raises: ValueError if the shapes do not belong together or H_kv does not divide H.
    Source: notes §4.1, §4.4, §4.10.
    """
    check_attention(q, k, v)
    learnt = len(wanted) > 4 and wanted[4]  # a bias that is not learnt needs no gradient as large as the scores
    (B, H, L_q, d_head), (_, H_kv, L_k, d_v) = q.shape, v.shape
    check_pattern("scaled_dot_product_attention", L_q, L_k, keep, bias, H, B, causal, window)
    factor = q.dtype.type(1.0 / np.sqrt(d_head) if scale is None else scale)
    scaled = np.multiply(q, factor, out=scratch.empty(q.shape, q.dtype))
    pattern = Pattern(L_q, L_k, causal, window, blocks.in_five_axes(keep, H_kv), blocks.in_five_axes(bias, H_kv))
    out = scratch.empty((B, L_q, H, d_v), q.dtype).transpose(0, 2, 1, 3)  # heads side by side: merging copies nothing
    lse = scratch.empty((B, H_kv, H // H_kv, 1, L_q), q.dtype)
    q5, o5, k5, v5 = blocks.by_kv_head(scaled, H_kv), blocks.by_kv_head(out, H_kv), k[:, :, None], v[:, :, None]
    work = blocks.tasks(B, H_kv, H // H_kv, L_q, L_k, q.itemsize, causal)
    kept = blocks.forward(q5, k5, v5, o5, lse, pattern, work, keep=is_recording())

    def vjp(dy):
        dq, dk, dv = (scratch.empty(a.shape, q.dtype) for a in (q, k, v))
        delta = np.einsum("bhld,bhld->bhl", dy, out).reshape(lse.shape)
        do5, dq5 = blocks.by_kv_head(dy, H_kv), blocks.by_kv_head(dq, H_kv)
        dbias = np.zeros(pattern.bias.shape, q.dtype) if learnt and pattern.bias is not None else None
        blocks.backward(q5, k5, v5, lse, delta, do5, dq5, dk[:, :, None], dv[:, :, None], dbias, pattern, work, kept)
        dq *= factor
        for_bias = None if bias is None or dbias is None else dbias.reshape(bias.shape)
        return (dq, dk, dv, None, for_bias)[: len(wanted)]

    return out, vjp


@derived("rotary_attention")
def rotary_attention(
    qkv: np.ndarray,
    angles: np.ndarray,
    *,
    H: int,
    H_kv: int,
    pairing: str = "interleaved",
    scale: float | None = None,
):
    r"""Causal self-attention of a decoder block, from the joint projection to the merged heads.

    Equation: `mha` $\mathrm{Concat}_h(\mathrm{softmax}(\mathbf S_h)\mathbf V_h)$
    Equation: `gqa` head h reads key/value head $\lfloor hH_{kv}/H\rfloor$
    Shapes: qkv (B, L, (H + 2 H_kv) d_head), angles (L, d_head / 2) -> (B, L, H d_head);
        keeps rotated q and k, the values, the output and the log-normalisers (B, H, L).
    Raises: ValueError if the width is not a multiple of H + 2 H_kv, or the angles do not fit.
    Source: notes §4.1, §4.4, §4.10.
    """
    d_head = check_rotary(qkv, angles, H, H_kv, pairing)
    B, L, _ = qkv.shape
    qkv = np.ascontiguousarray(qkv)  # pairs are read as complex numbers, which must be whole in memory
    turn = _Turn(angles, qkv.dtype, H, H_kv, d_head, pairing, scale)
    qk = turn.forward(qkv)  # (B, L, H + H_kv, d_head), queries scaled
    value = qkv.reshape(B, L, H + 2 * H_kv, d_head)[:, :, H + H_kv :]
    out = scratch.empty((B, L, H, d_head), qkv.dtype)
    lse = scratch.empty((B, H_kv, H // H_kv, 1, L), qkv.dtype)
    q, k, v, o = _by_head(qk, value, out, H, H_kv)
    pattern, work = Pattern(L, L, causal=True), blocks.tasks(B, H_kv, H // H_kv, L, L, qkv.itemsize, causal=True)
    kept = blocks.forward(q, k, v, o, lse, pattern, work, keep=is_recording())

    def vjp(dy):
        dqkv = scratch.empty((B, L, H + 2 * H_kv, d_head), qkv.dtype)
        dqk = scratch.empty((B, L, H + H_kv, d_head), qkv.dtype)
        d_out = dy.reshape(out.shape)
        dq, dk, dv, do = _by_head(dqk, dqkv[:, :, H + H_kv :], d_out, H, H_kv)
        delta = np.multiply(d_out, out, out=scratch.empty(out.shape, qkv.dtype)) @ np.ones(d_head, qkv.dtype)
        delta = delta.transpose(0, 2, 1).reshape(lse.shape)
        blocks.backward(q, k, v, lse, delta, do, dq, dk, dv, None, pattern, work, kept)
        turn.backward(dqk, dqkv)
        return dqkv.reshape(qkv.shape)

    return out.reshape(B, L, H * d_head), vjp


class _Turn:
    """Rotate queries and keys and scale the queries, in one pass, and pull gradients back through both.

    Interleaved pairs are complex numbers, so the rotation is a multiplication by $e^{i\\varphi}$ over a row of
    all heads at once.
    """

    def __init__(self, angles, dtype, H: int, H_kv: int, d_head: int, pairing: str, scale: float | None):
        self.H, self.H_kv, self.d_head, self.pairing = H, H_kv, d_head, pairing
        self.scale = dtype.type(1.0 / np.sqrt(d_head) if scale is None else scale)
        self.cos, self.sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
        if pairing == "interleaved":
            self.complex = np.result_type(dtype, np.complex64)
            factor = np.exp(1j * angles)[:, None, :].repeat(H + H_kv, axis=1)
            factor[:, :H] *= self.scale
            self.factor = factor.reshape(len(angles), -1).astype(self.complex)  # (L, (H + H_kv) d_head / 2)

    def forward(self, qkv: np.ndarray) -> np.ndarray:
        B, L, _ = qkv.shape
        heads = self.H + self.H_kv
        out = scratch.empty((B, L, heads, self.d_head), qkv.dtype)
        joint = qkv[:, :, : heads * self.d_head]
        if self.pairing == "interleaved":
            flat = out.reshape(B, L, heads * self.d_head)
            np.multiply(joint.view(self.complex), self.factor, out=flat.view(self.complex))
            return out
        rotate(joint.reshape(out.shape), self.cos[:, None], self.sin[:, None], "half", out)
        out[:, :, : self.H] *= self.scale
        return out

    def backward(self, dqk: np.ndarray, dqkv: np.ndarray) -> None:
        """Write the gradient of the unrotated queries and keys into the front of ``dqkv``."""
        B, L, heads, _ = dqk.shape
        if self.pairing == "interleaved":
            width = heads * self.d_head
            target = dqkv.reshape(B, L, dqkv.shape[2] * self.d_head)[:, :, :width].view(self.complex)
            np.multiply(dqk.reshape(B, L, width).view(self.complex), self.factor.conj(), out=target)
            return
        rotate(dqk, self.cos[:, None], -self.sin[:, None], "half", dqkv[:, :, :heads])
        dqkv[:, :, : self.H] *= self.scale


def _by_head(qk, value, out, H: int, H_kv: int):
    """Views with the head in front of the position: q, o (B, H_kv, H/H_kv, L, d); k, v (B, H_kv, 1, L, d)."""
    B, L, _, d = out.shape
    q = qk[:, :, :H].reshape(B, L, H_kv, H // H_kv, d).transpose(0, 2, 3, 1, 4)
    o = out.reshape(B, L, H_kv, H // H_kv, d).transpose(0, 2, 3, 1, 4)
    k = qk[:, :, H:].transpose(0, 2, 1, 3)[:, :, None]
    return q, k, value.transpose(0, 2, 1, 3)[:, :, None], o


def cached_attention(
    qkv: Tensor,
    angles: np.ndarray,
    cache: Any,
    layer: int,
    *,
    H: int,
    H_kv: int,
    pairing: str = "interleaved",
    scale: float | None = None,
) -> Tensor:
    r"""The attention of `rotary_attention` for new positions, over cached and new keys; no gradient.

    Equation: `kv-cache` append $k_t,v_t$; attend $q_t$ over $1..t$
    Shapes: qkv (B, L_new, (H + 2 H_kv) d_head), angles (L_new, d_head / 2) of the new positions -> (B, L_new, H d_head)
    Raises: ValueError if the width or the angles do not fit; RuntimeError if a gradient would be needed.
    Source: notes §4.3.
    """
    if is_recording() and qkv.requires_grad:
        raise RuntimeError("cached_attention: decoding with a cache has no gradient. Wrap it in `with no_grad():`.")
    d_head = check_rotary(qkv, angles, H, H_kv, pairing)
    B, L, _ = qkv.shape
    qk = _Turn(angles, qkv.dtype, H, H_kv, d_head, pairing, scale).forward(qkv.data)
    out = scratch.empty((B, L, H, d_head), qkv.dtype)
    new_values = qkv.data.reshape(B, L, H + 2 * H_kv, d_head)[:, :, H + H_kv :]
    q, k, v, o = _by_head(qk, new_values, out, H, H_kv)
    keys, values = cache.write(layer, k[:, :, 0], v[:, :, 0])
    if (
        L > 1
    ):  # a prompt: cut as in training, so that no L x L memory is needed and most of what is hidden is not computed
        S = keys.shape[2]
        lse = scratch.empty((B, H_kv, H // H_kv, 1, L), qkv.dtype)
        work = blocks.tasks(B, H_kv, H // H_kv, L, S, qkv.dtype.itemsize, causal=True)
        blocks.forward(q, keys[:, :, None], values[:, :, None], o, lse, Pattern(L, S, causal=True), work)
        return wrap(out.reshape(B, L, H * d_head))
    s = q @ keys[:, :, None].swapaxes(-1, -2)  # (B, H_kv, H/H_kv, 1, L_all)
    s -= s.max(-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(-1, keepdims=True)
    np.matmul(s, values[:, :, None], out=o)
    return wrap(out.reshape(B, L, H * d_head))
