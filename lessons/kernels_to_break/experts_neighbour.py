"""A grouped product whose tiles do not stop at the end of an expert: they overwrite the neighbour's first rows.

    python -m kernels compare experts --impl lessons/kernels_to_break/experts_neighbour.py:grouped_linear

Rows are sorted by expert, and a tile takes sixteen of them. An expert's last tile reaches over its end into the rows
of the next. Where programs run in order the neighbour repairs the damage, so this kernel takes them from the last
to the first, as a GPU may do at any time. With rows in multiples of sixteen nothing is wrong.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(X, W, OFFSETS, OUT, n, m, n_rows, n_experts, BLOCK: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """All rows of one expert: X (rows, m), W (experts, n, m), OUT (rows, n), contiguous."""
    e = (n_experts - 1 - tl.program_id(0)).to(tl.int64)
    first, last = tl.load(OFFSETS + e), tl.load(OFFSETS + e + 1)
    c, r = tl.arange(0, M), tl.arange(0, N)
    inside = (r < n)[:, None] & (c < m)[None, :]
    w = tl.load(W + e * n * m + r[:, None] * m + c[None, :], mask=inside, other=0.0).to(tl.float32)
    for start in range(first, last, BLOCK):
        rows = (start + tl.arange(0, BLOCK)).to(tl.int64)
        there = rows < n_rows  # the bug: rows < last
        x = tl.load(X + rows[:, None] * m + c[None, :], mask=there[:, None] & (c < m)[None, :], other=0.0)
        y = tl.dot(x.to(tl.float32), tl.trans(w), input_precision="ieee")
        at = OUT + rows[:, None] * n + r[None, :]
        tl.store(at, y.to(OUT.dtype.element_ty), mask=there[:, None] & (r < n)[None, :])


def grouped_linear(x, w, offsets):
    """Held against the reference of the same name."""
    x, w = x.detach().contiguous(), w.detach().contiguous()
    (n_rows, m), (n_experts, n, _) = x.shape, w.shape
    out = torch.zeros(n_rows, n, dtype=x.dtype, device=x.device)
    if out.numel():
        widths = {"N": max(16, 1 << (n - 1).bit_length()), "M": max(16, 1 << (m - 1).bit_length())}
        _kernel[(n_experts,)](x, w, offsets.to(torch.int64), out, n, m, n_rows, n_experts, BLOCK=16, **widths)
    return out
