"""Attention with an offset that is off by one: every query sees the mask of the key before.

    python -m kernels compare attention --impl lessons/kernels_to_break/attention_off_by_one.py:attention

The score of key j is held against the mask of key j - 1. Where all keys are seen only the first is lost; under a
causal mask each query misses its first key and sees one of the future. The smallest case is one query and one key:
the query has no key left, and its output is 0.
"""

import triton
import triton.language as tl
from attention_frame import launched


@triton.jit
def _kernel(
    Q, K, V, OUT, KEEP, L_q, L_k, d, d_v, scale, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: Q, K, V, OUT contiguous (heads, L, width), KEEP (heads, L_q, L_k)."""
    blocks = tl.cdiv(L_q, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    c, c_v = tl.arange(0, D), tl.arange(0, DV)
    present = rows < L_q
    at = head * L_q * d + rows[:, None] * d + c[None, :]
    q = tl.load(Q + at, mask=present[:, None] & (c < d)[None, :], other=0.0).to(tl.float32)
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    o = tl.zeros((BLOCK, DV), tl.float32)
    for start in range(0, L_k, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        inside = keys < L_k
        at = head * L_k * d + keys[:, None] * d + c[None, :]
        k = tl.load(K + at, mask=inside[:, None] & (c < d)[None, :], other=0.0).to(tl.float32)
        at = head * L_k * d_v + keys[:, None] * d_v + c_v[None, :]
        v = tl.load(V + at, mask=inside[:, None] & (c_v < d_v)[None, :], other=0.0).to(tl.float32)
        at = head * L_q * L_k + rows[:, None] * L_k + keys[None, :]
        before = present[:, None] & inside[None, :] & (keys > 0)[None, :]
        keep = tl.load(KEEP + at - 1, mask=before, other=0) != 0  # the bug: the offset is one too small
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            s = cap * (2.0 * tl.sigmoid(2.0 * s / cap) - 1.0)
        s = tl.where(keep, s, float("-inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet: no inf - inf
        p = tl.exp(s - safe[:, None])
        old = tl.exp(m - safe)
        total = total * old + tl.sum(p, axis=1)
        o = o * old[:, None] + tl.dot(p, v, input_precision="ieee")
        m = new
    o = o / tl.where(total > 0.0, total, 1.0)[:, None]
    at = head * L_q * d_v + rows[:, None] * d_v + c_v[None, :]
    tl.store(OUT + at, o.to(OUT.dtype.element_ty), mask=present[:, None] & (c_v < d_v)[None, :])


def attention(
    q, k, v, key_lengths=None, prefix=None, causal=False, window=None, align="bottom-right", scale=None, softcap=None
):
    """Held against the reference of the same name."""
    return launched(_kernel, q, k, v, key_lengths, prefix, causal, window, align, scale, softcap)
