"""RMSNorm with the mask of the last block dropped: it squares what lies behind the end of the row.

    python -m kernels compare norm --impl lessons/kernels_to_break/norm_last_block.py:rms_norm

`compare` puts NaN behind every tensor, so the smallest case is one number. On a GPU the memory behind a row holds
the next row, and the result is wrong by a factor that looks like noise.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(X, G, Y, d, stride_row, stride_col, stride_g, eps, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride_row + cols * stride_col).to(tl.float32)  # the bug: mask=cols < d, other=0.0
        squares += x * x
    rho = tl.rsqrt(tl.sum(squares, axis=0) / d + eps)
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride_row + cols * stride_col, mask=cols < d, other=0.0).to(tl.float32)
        g = tl.load(G + cols * stride_g, mask=cols < d, other=0.0).to(tl.float32)
        tl.store(Y + row * d + cols, (x * rho * g).to(Y.dtype.element_ty), mask=cols < d)


def rms_norm(x, g, eps):
    """Held against the reference of the same name."""
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        _kernel[(len(rows),)](rows, g.detach(), y, rows.shape[1], *rows.stride(), g.stride(0), eps, BLOCK=16)
    return y.reshape(x.shape)
