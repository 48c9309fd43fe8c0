r"""Causal rotary attention in one piece, with a hand-derived gradient and no $L\times L$ memory.

Equation: `mha` $\mathrm{Concat}_h(\mathrm{softmax}(\mathbf S_h)\mathbf V_h)$
Source: notes §4.1, §4.10; the recomputation in the backward pass is that of FlashAttention (Dao et al. 2022).

How the work is cut. A task is a group of sequences and a block of queries $[i_0,i_1)$; it sees the keys
$[0,i_1)$ and no others, so most of the masked half is never computed. Scores are kept transposed,
$S^\top=\mathbf K\mathbf Q^\top$ with keys on rows: maxima and sums over keys then run along rows of queries,
where NumPy adds whole vectors. Only the square on the diagonal needs a mask.

What is kept. Rotated queries and keys, the output and one number per query and head, the logarithm of the
normaliser, from which the backward pass makes the probabilities again: $P=\exp(S-\mathrm{LSE})$.

The gradient. With $O=PV$: $\bar V=P^\top\bar O$ and $\bar P=\bar OV^\top$. The softmax gives
$\bar S=P\odot(\bar P-\delta)$ with $\delta_i=\sum_j\bar P_{ij}P_{ij}=\sum_d\bar O_{id}O_{id}$. Then
$\bar Q=\bar SK$ and $\bar K=\bar S^\top Q$, both turned back by the rotation.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from minillm.autograd import Tensor, is_recording, scratch
from minillm.autograd.operation import derived
from minillm.autograd.tape import wrap
from minillm.functional.attention import check_rotary
from minillm.fused.positions import rotate

QUERY_BLOCK = 64
GROUP_BYTES = 1 << 20  # scores of one task: they should stay in the second-level cache


@derived("rotary_attention")
def rotary_attention(qkv: np.ndarray, angles: np.ndarray, *, H: int, H_kv: int, pairing: str = "interleaved"):
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
    turn = _Turn(angles, qkv.dtype, H, H_kv, d_head, pairing)
    qk = turn.forward(qkv)  # (B, L, H + H_kv, d_head), queries scaled
    value = qkv.reshape(B, L, H + 2 * H_kv, d_head)[:, :, H + H_kv :]
    out = scratch.empty((B, L, H, d_head), qkv.dtype)
    lse = scratch.empty((B, H_kv, H // H_kv, 1, L), qkv.dtype)
    q, k, v, o = _by_head(qk, value, out, H, H_kv)
    tasks = _tasks(B, L, H, qkv.itemsize)
    for rows, block in tasks:
        _forward_block(q[rows], k[rows], v[rows], o[rows], lse[rows], block)

    def vjp(dy):
        dqkv = scratch.empty((B, L, H + 2 * H_kv, d_head), qkv.dtype)
        dqk = scratch.empty((B, L, H + H_kv, d_head), qkv.dtype)
        d_out = dy.reshape(out.shape)
        dq, dk, dv, do = _by_head(dqk, dqkv[:, :, H + H_kv :], d_out, H, H_kv)
        delta = np.multiply(d_out, out, out=scratch.empty(out.shape, qkv.dtype)) @ np.ones(d_head, qkv.dtype)
        delta = delta.transpose(0, 2, 1).reshape(lse.shape)
        for rows, block in tasks:
            _backward_block(
                q[rows], k[rows], v[rows], lse[rows], delta[rows], do[rows], dq[rows], dk[rows], dv[rows], block
            )
        turn.backward(dqk, dqkv)
        return dqkv.reshape(qkv.shape)

    return out.reshape(B, L, H * d_head), vjp


class _Turn:
    """Rotate queries and keys and scale the queries, in one pass, and pull gradients back through both.

    Interleaved pairs are complex numbers, so the rotation is a multiplication by $e^{i\\varphi}$ over a row of
    all heads at once.
    """

    def __init__(self, angles, dtype, H: int, H_kv: int, d_head: int, pairing: str):
        self.H, self.H_kv, self.d_head, self.pairing = H, H_kv, d_head, pairing
        self.scale = dtype.type(1.0 / np.sqrt(d_head))
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


def _tasks(B: int, L: int, H: int, itemsize: int) -> list[tuple[slice, tuple[int, int]]]:
    """Groups of sequences times blocks of queries, latest block first, so that it sets dk and dv."""
    block = QUERY_BLOCK if L > QUERY_BLOCK * 3 // 2 else max(L, 1)
    group = max(1, GROUP_BYTES // max(H * L * block * itemsize, 1))
    starts = list(range(0, L, block))
    return [(slice(b, b + group), (i, min(i + block, L))) for b in range(0, B, group) for i in reversed(starts)]


@lru_cache(maxsize=32)
def _diagonal_mask(n: int, dtype: np.dtype) -> np.ndarray:
    """Additive mask of the square on the diagonal, transposed: minus infinity where key > query."""
    mask = np.where(np.tril(np.ones((n, n), bool), -1), -np.inf, 0).astype(dtype)
    mask.flags.writeable = False
    return mask


def _scores(q, k, block: tuple[int, int]) -> np.ndarray:
    """Masked, transposed scores of one task: (b, H_kv, H/H_kv, keys, queries)."""
    start, stop = block
    s = scratch.empty((*q.shape[:3], stop, stop - start), q.dtype)
    np.matmul(k[..., :stop, :], q[..., start:stop, :].swapaxes(-1, -2), out=s)
    s[..., start:, :] += _diagonal_mask(stop - start, q.dtype)
    return s


def _forward_block(q, k, v, o, lse, block: tuple[int, int]) -> None:
    start, stop = block
    s = _scores(q, k, block)
    top = s.max(-2, keepdims=True)  # (b, H_kv, H/H_kv, 1, queries)
    s -= top
    np.exp(s, out=s)
    total = np.ones((1, stop), s.dtype) @ s
    np.matmul(s.swapaxes(-1, -2), v[..., :stop, :], out=o[..., start:stop, :])
    o[..., start:stop, :] /= total.swapaxes(-1, -2)
    np.add(np.log(total), top, out=lse[..., start:stop])


def _backward_block(q, k, v, lse, delta, do, dq, dk, dv, block: tuple[int, int]) -> None:
    start, stop = block
    queries, keys = np.s_[..., start:stop, :], np.s_[..., :stop, :]
    p = _scores(q, k, block)
    p -= lse[..., start:stop]
    np.exp(p, out=p)
    ds = np.matmul(v[keys], do[queries].swapaxes(-1, -2), out=scratch.empty(p.shape, p.dtype))
    _accumulate(dv, p, do[queries], keys, first=stop == q.shape[-2])
    ds -= delta[..., start:stop]
    ds *= p
    np.matmul(ds.swapaxes(-1, -2), k[keys], out=dq[queries])
    _accumulate(dk, ds, q[queries], keys, first=stop == q.shape[-2])


def _accumulate(target, weights, rows, keys, first: bool) -> None:
    """target[keys] (+)= weights rows, summed over the query heads that share a key head."""
    part = np.matmul(weights, rows)
    part = part.sum(2, keepdims=True) if part.shape[2] > 1 else part
    if first:
        target[...] = part
    else:
        target[keys] += part


def cached_attention(
    qkv: Tensor, angles: np.ndarray, cache: Any, layer: int, *, H: int, H_kv: int, pairing: str = "interleaved"
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
    qk = _Turn(angles, qkv.dtype, H, H_kv, d_head, pairing).forward(qkv.data)
    out = scratch.empty((B, L, H, d_head), qkv.dtype)
    new_values = qkv.data.reshape(B, L, H + 2 * H_kv, d_head)[:, :, H + H_kv :]
    q, k, v, o = _by_head(qk, new_values, out, H, H_kv)
    keys, values = cache.write(layer, k[:, :, 0], v[:, :, 0])
    s = q @ keys[:, :, None].swapaxes(-1, -2)  # (B, H_kv, H/H_kv, L_new, L_all)
    if L > 1:
        s += _diagonal_mask(s.shape[-1], s.dtype).T[-L:]
    s -= s.max(-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(-1, keepdims=True)
    np.matmul(s, values[:, :, None], out=o)
    return wrap(out.reshape(B, L, H * d_head))
