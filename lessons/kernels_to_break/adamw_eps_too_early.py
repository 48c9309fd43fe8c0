"""AdamW that adds eps before the second moment's bias is corrected, so that early steps are too short.

    python -m kernels compare adamw --impl lessons/kernels_to_break/adamw_eps_too_early.py:adamw

The root of n divided by a root of 1 - beta2^t, then eps: that is the order. Here eps is added first and divided as
well, so at step t it is larger by a factor of (1 - beta2^t)^-1/2, which is 32 at the first step with beta2 = 0.999.
After some thousand steps the factor is 1, and with eps = 1e-8 beside gradients of ordinary size nobody sees it;
parameters with tiny gradients, an embedding's rare rows above all, hardly move in the beginning.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(
    THETA, G, M, N, NEW_THETA, NEW_M, NEW_N, size, scale, beta1, beta2, eps, keep, rate, correction,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of all tensors, contiguous; correction is sqrt(1 - beta2^t), rate is lr / (1 - beta1^t)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    g = tl.load(G + at, mask=there, other=0.0).to(tl.float32) * scale
    m = beta1 * tl.load(M + at, mask=there, other=0.0) + (1.0 - beta1) * g
    n = beta2 * tl.load(N + at, mask=there, other=0.0) + (1.0 - beta2) * g * g
    theta = tl.load(THETA + at, mask=there, other=0.0).to(tl.float32)
    theta = theta * keep - rate * m / ((tl.sqrt(n) + eps) / correction)  # the bug: sqrt(n) / correction + eps
    tl.store(NEW_THETA + at, theta.to(NEW_THETA.dtype.element_ty), mask=there)
    tl.store(NEW_M + at, m, mask=there)
    tl.store(NEW_N + at, n, mask=there)


def adamw(theta, g, m, n, lr, beta1, beta2, eps, weight_decay, t, scale):
    """Held against the reference of the same name."""
    given = [tensor.detach().contiguous() for tensor in (theta, g, m, n)]
    new = [torch.empty_like(given[i]) for i in (0, 2, 3)]
    size = theta.numel()
    if size:
        rate, correction = lr / (1 - beta1**t), (1 - beta2**t) ** 0.5
        _kernel[(-(-size // 16),)](
            *given, *new, size, scale, beta1, beta2, eps, 1 - lr * weight_decay, rate, correction, BLOCK=16
        )
    return tuple(new)
