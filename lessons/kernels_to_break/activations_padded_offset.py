"""SwiGLU whose gate begins at the padded width: right wherever the width is a multiple of the block.

    python -m kernels compare activations --impl lessons/kernels_to_break/activations_padded_offset.py:swiglu

The joint projection holds [value; gate], each of d_ff numbers. The kernel looks for the gate behind whole blocks of
sixteen instead of behind d_ff numbers. Every model whose d_ff is a multiple of sixteen is right.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(H, OUT, d_ff, BLOCK: tl.constexpr):
    """One row of 2 d_ff numbers, contiguous."""
    row = tl.program_id(0).to(tl.int64)
    padded = tl.cdiv(d_ff, BLOCK) * BLOCK  # the bug: the gate begins at d_ff
    for start in range(0, d_ff, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        value = tl.load(H + row * 2 * d_ff + cols, mask=cols < d_ff, other=0.0).to(tl.float32)
        gate = tl.load(H + row * 2 * d_ff + padded + cols, mask=padded + cols < 2 * d_ff, other=0.0).to(tl.float32)
        tl.store(OUT + row * d_ff + cols, (value * gate * tl.sigmoid(gate)).to(OUT.dtype.element_ty), mask=cols < d_ff)


def swiglu(h):
    """Held against the reference of the same name."""
    d_ff = h.shape[-1] // 2
    rows = h.detach().reshape(h.shape[:-1].numel(), 2 * d_ff).contiguous()
    out = torch.empty(len(rows), d_ff, dtype=h.dtype, device=h.device)
    if out.numel():
        _kernel[(len(rows),)](rows, out, d_ff, BLOCK=16)
    return out.reshape(*h.shape[:-1], d_ff)
