"""Causal linear attention in chunks whose tokens see the whole chunk: also what comes after them.

    python -m kernels compare linear_attention --impl lessons/kernels_to_break/linear_attention_whole_chunk.py:linear_attention

A chunk's keys are added to the state before its queries read it, which saves the masked product inside the chunk. The
state at the end is right, and so is the last token of every chunk: whoever tests by generating one token at a time
finds nothing. Every other token is answered with knowledge of the future, and training on it looks splendid.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(Q, K, V, S, Z, OUT, L, d, d_v, eps, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr):
    """One head: Q, K (L, d), V, OUT (L, d_v), and the state S (d, d_v) and Z (d,), which are carried on in place."""
    head = tl.program_id(0).to(tl.int64)
    c, c_v = tl.arange(0, D), tl.arange(0, DV)
    at_state = head * d * d_v + c[:, None] * d_v + c_v[None, :]
    in_state = (c < d)[:, None] & (c_v < d_v)[None, :]
    s = tl.load(S + at_state, mask=in_state, other=0.0)
    z = tl.load(Z + head * d + c, mask=c < d, other=0.0)
    for start in range(0, L, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        there, there_v = (rows < L)[:, None] & (c < d)[None, :], (rows < L)[:, None] & (c_v < d_v)[None, :]
        at, at_v = head * L * d + rows[:, None] * d + c[None, :], head * L * d_v + rows[:, None] * d_v + c_v[None, :]
        q = tl.load(Q + at, mask=there, other=0.0).to(tl.float32)
        k = tl.load(K + at, mask=there, other=0.0).to(tl.float32)
        v = tl.load(V + at_v, mask=there_v, other=0.0).to(tl.float32)
        s = tl.dot(tl.trans(k), v, s, input_precision="ieee")  # the bug: the queries below are to read s as it was,
        z += tl.sum(k, axis=0)  # and to meet the keys of their own chunk in tril(q k^T) v
        o = tl.dot(q, s, input_precision="ieee") / (tl.sum(q * z[None, :], axis=1) + eps)[:, None]
        tl.store(OUT + at_v, o.to(OUT.dtype.element_ty), mask=there_v)
    tl.store(S + at_state, s, mask=in_state)
    tl.store(Z + head * d + c, z, mask=c < d)


def linear_attention(phi_q, phi_k, v, state=None, normaliser=None, eps=1e-6):
    """Held against the reference of the same name."""
    q, k, v = (tensor.detach().contiguous() for tensor in (phi_q, phi_k, v))
    (B, H, L, d), d_v = q.shape, v.shape[-1]
    single = {"dtype": torch.float32, "device": q.device}
    s = torch.zeros(B, H, d, d_v, **single) if state is None else state.detach().to(**single, copy=True).contiguous()
    z = torch.zeros(B, H, d, **single) if normaliser is None else normaliser.detach().to(**single, copy=True).contiguous()
    o = torch.empty_like(v)
    widths = {"D": max(16, 1 << (d - 1).bit_length()), "DV": max(16, 1 << (d_v - 1).bit_length())}
    if B * H:
        _kernel[(B * H,)](q, k, v, s, z, o, L, d, d_v, eps, BLOCK=16, **widths)
    return o, s, z
