"""Decoding that looks one key too far: the token after the new one, or whatever the cache holds there.

    python -m kernels compare decode --impl lessons/kernels_to_break/decode_one_too_many.py:decode_attention

With L_q new tokens in a cache of `length`, token i stands at place length - L_q + i and sees the keys up to and
including that place. Here it sees one more. The last token is saved by the check against the length, so decoding
one token at a time is right; only the others look into the future.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(
    Q, K, V, LENGTHS, OUT, LSE, H, group, L_q, capacity, d, d_v, scale, window, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One new token of one head: Q (B, H, L_q, d), K and V (B, H / group, capacity, .), contiguous."""
    row = tl.program_id(0).to(tl.int64)
    b, kv = row // (H * L_q), row // (group * L_q)
    length = tl.load(LENGTHS + b)
    place = length - L_q + row % L_q
    c, c_v = tl.arange(0, D), tl.arange(0, DV)
    q = tl.load(Q + row * d + c, mask=c < d, other=0.0).to(tl.float32)
    m = tl.max(tl.full((BLOCK,), float("-inf"), tl.float32), axis=0)
    total = tl.sum(tl.zeros((BLOCK,), tl.float32), axis=0)
    o = tl.zeros((DV,), tl.float32)
    for start in range(0, capacity, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        seen = (keys < length) & (keys <= place + 1) & (keys > place - window)  # the bug: keys <= place
        at = (kv * capacity + keys)[:, None]
        k = tl.load(K + at * d + c[None, :], mask=seen[:, None] & (c < d)[None, :], other=0.0).to(tl.float32)
        v = tl.load(V + at * d_v + c_v[None, :], mask=seen[:, None] & (c_v < d_v)[None, :], other=0.0).to(tl.float32)
        s = tl.sum(k * q[None, :], axis=1) * scale
        if CAPPED:
            s = cap * (2.0 * tl.sigmoid(2.0 * s / cap) - 1.0)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(m, tl.max(s, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - safe)
        old = tl.exp(m - safe)
        total = total * old + tl.sum(p, axis=0)
        o = o * old + tl.sum(p[:, None] * v, axis=0)
        m = new
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    tl.store(LSE + row, tl.where(some, m + tl.log(total), float("-inf")))
    tl.store(OUT + row * d_v + c_v, (o / total).to(OUT.dtype.element_ty), mask=c_v < d_v)


def decode_attention(q, k, v, lengths, scale=None, window=None, softcap=None):
    """Held against the reference of the same name."""
    q, k, v = (t.detach().contiguous() for t in (q, k, v))
    (B, H, L_q, d), (_, H_kv, capacity, d_v) = q.shape, v.shape
    if lengths is None:
        lengths = torch.full((B,), capacity, device=q.device)
    o = torch.empty(B, H, L_q, d_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, L_q, dtype=torch.float32, device=q.device)
    if lse.numel():
        widths = {"D": max(16, 1 << (d - 1).bit_length()), "DV": max(16, 1 << (d_v - 1).bit_length())}
        _kernel[(B * H * L_q,)](
            q, k, v, lengths.clamp(0, capacity).to(torch.int64), o, lse, H, H // H_kv, L_q, capacity, d, d_v,
            d**-0.5 if scale is None else scale, capacity + L_q + 1 if window is None else window, softcap or 1.0,
            CAPPED=softcap is not None, BLOCK=16, **widths,
        )  # fmt: skip
    return o, lse
