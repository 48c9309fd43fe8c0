"""A product with NF4 weights that begins every row of W at a whole byte.

    python -m kernels compare quantised --impl lessons/kernels_to_break/quantised_half_byte.py:nf4_linear

Two codes share a byte, and W is packed as one long row: with an odd number of columns every second row begins in the
middle of a byte. The kernel looks for it at the next one. Widths of real models are even, and there it is right.
"""

import torch
import triton
import triton.language as tl

from minillm.functional.nf4 import nf4_levels


@triton.jit
def _kernel(X, PACKED, SCALE, LEVELS, OUT, n_rows, n, k, block, BLOCK: tl.constexpr, K: tl.constexpr):
    """BLOCK rows of X (n_rows, k) with BLOCK rows of W (n, k); OUT (n_rows, n), contiguous."""
    strips = tl.cdiv(n, BLOCK)
    rows = (tl.program_id(0) // strips).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    outs = (tl.program_id(0) % strips).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, K)
    there = (outs < n)[:, None] & (c < k)[None, :]
    byte = outs[:, None] * ((k + 1) // 2) + (c // 2)[None, :]  # the bug: (outs k + c) // 2, and its parity below
    both = tl.load(PACKED + byte, mask=there & (byte < (n * k + 1) // 2), other=0).to(tl.int32)
    code = tl.where((c % 2 == 0)[None, :], both >> 4, both & 15)
    scale = tl.load(SCALE + (outs[:, None] * k + c[None, :]) // block, mask=there, other=0.0)
    w = tl.where(there, tl.load(LEVELS + code) * scale, 0.0)
    x = tl.load(X + rows[:, None] * k + c[None, :], mask=(rows < n_rows)[:, None] & (c < k)[None, :], other=0.0)
    y = tl.dot(x, tl.trans(w.to(x.dtype)), input_precision="ieee")
    inside = (rows < n_rows)[:, None] & (outs < n)[None, :]
    tl.store(OUT + rows[:, None] * n + outs[None, :], y.to(OUT.dtype.element_ty), mask=inside)


def nf4_linear(x, packed, scale, n_out, block):
    """Held against the reference of the same name."""
    k = x.shape[-1]
    rows = x.detach().reshape(x.shape[:-1].numel(), k).contiguous()
    out = torch.empty(len(rows), n_out, dtype=x.dtype, device=x.device)
    if out.numel():
        levels = torch.from_numpy(nf4_levels().copy()).to(x.device)
        _kernel[(-(-len(rows) // 16) * -(-n_out // 16),)](
            rows, packed.contiguous(), scale.contiguous(), levels, out, len(rows), n_out, k, block,
            BLOCK=16, K=max(16, 1 << (k - 1).bit_length()),
        )  # fmt: skip
    return out.reshape(*x.shape[:-1], n_out)
