"""Device code of softmax and its logarithm over existing logits, and of their gradient: two passes over a row each.

Rows are walked as in `kernel_rows.py`, and the first pass is the same. What is kept for the backward is the logits and,
for every row, the largest of them and the base-2 logarithm of the sum.
"""

# Calls between device functions and tl.range are unknown to a type checker.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.token_loss.kernel_rows import _scan
from kernels.token_loss.kernel_tiles import LOG2


@triton.jit(do_not_specialize=["n_rows"])
def _softmax_kernel(
    X, Y, TOP, LOG_SUM, n_rows, V, stride_row, stride_col, scale,
    LOG: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr, LANE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """softmax, or with LOG its logarithm, of whole rows; Y is contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = rows < n_rows
    at = rows * stride_row
    top, log_sum, _, _ = _scan(
        X, at, present, V, stride_col, scale, False, False, BLOCK_ROWS, BLOCK_V, STAGES, LANE, PACKED, True
    )
    tl.store(TOP + rows, top, mask=present)
    tl.store(LOG_SUM + rows, log_sum, mask=present)
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        cols = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        mask = present[:, None] & (cols < V)[None, :]
        where = X + at[:, None] + cols[None, :] * stride_col
        x = tl.load(where, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        depth = (x - top[:, None]) * scale - log_sum[:, None]
        if LOG:
            y = depth * LOG2
        else:
            y = tl.exp2(depth)
        tl.store(Y + rows[:, None] * V + cols[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _softmax_backward_kernel(
    DY, X, TOP, LOG_SUM, DX, n_rows, V, stride_row, stride_col, stride_x_row, stride_x_col, scale,
    LOG: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = p (dy - sum dy p) for softmax, dy - p sum dy for its logarithm; DX is contiguous.

    p is computed again from the logits: from a 16-bit output, log p = -20 would be off by one part in a hundred.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = rows < n_rows
    top = tl.load(TOP + rows, mask=present, other=0.0)[:, None]
    log_sum = tl.load(LOG_SUM + rows, mask=present, other=0.0)[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_V), tl.float32)
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        cols = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        mask = present[:, None] & (cols < V)[None, :]
        where = DY + rows[:, None] * stride_row + cols[None, :] * stride_col
        dy = tl.load(where, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if LOG:
            total += dy
        else:
            where = X + rows[:, None] * stride_x_row + cols[None, :] * stride_x_col
            x = tl.load(where, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            total += dy * tl.exp2((x - top) * scale - log_sum)
    summed = tl.sum(total, axis=1)[:, None]
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        cols = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        mask = present[:, None] & (cols < V)[None, :]
        where = DY + rows[:, None] * stride_row + cols[None, :] * stride_col
        dy = tl.load(where, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        where = X + rows[:, None] * stride_x_row + cols[None, :] * stride_x_col
        x = tl.load(where, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        p = tl.exp2((x - top) * scale - log_sum)
        if LOG:
            dx = dy - p * summed
        else:
            dx = p * (dy - summed)
        tl.store(DX + rows[:, None] * V + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)
