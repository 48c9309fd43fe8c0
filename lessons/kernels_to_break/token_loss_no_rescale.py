"""Log-softmax in one pass that forgets to rescale its sum when a larger logit comes.

    python -m kernels compare token_loss --impl lessons/kernels_to_break/token_loss_no_rescale.py:log_softmax

The sum of exp(x - m) was gathered with an older maximum m. With logits that are all alike nothing is wrong, and
neither is anything wrong where the largest logit stands in the first block of sixteen.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(X, Y, V, BLOCK: tl.constexpr):
    """One row of V logits, contiguous."""
    row = tl.program_id(0).to(tl.int64) * V
    m = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + row + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(m, tl.max(x, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total + tl.sum(tl.exp(x - safe), axis=0)  # the bug: total * exp(m - safe) belongs here
        m = new
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + row + cols, mask=cols < V, other=0.0).to(tl.float32)
        tl.store(Y + row + cols, (x - m - tl.log(total)).to(Y.dtype.element_ty), mask=cols < V)


def log_softmax(logits):
    """Held against the reference of the same name."""
    rows = logits.detach().contiguous()
    y = torch.empty_like(rows)
    if rows.numel():
        _kernel[(rows.shape[:-1].numel(),)](rows, y, rows.shape[-1], BLOCK=16)
    return y
