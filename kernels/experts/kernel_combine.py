r"""Device code of the combination: every token collects what its experts made of it, in the order of its choices.

$$Z_n=\sum_{s=1}^{k}g_{ns}\,Y_{\eta(nk+s)},\qquad \bar g_{ns}=\langle A,U\rangle_{\eta(nk+s)} .$$

Collecting instead of scattering: nobody writes where another program writes, so there are no atomics and the order of
the sum is fixed. A dropped choice has place -1 and adds nothing. The same kernel without gates adds up the gradient of
x. Sums are fp32, each output is rounded once.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_tokens"])
def _combine_kernel(
    Y, PLACES, GATES, Z, n_tokens, d, top_k, stride_gates_row, stride_gates_col,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Z (N, d) from Y (A, d) and PLACES (N, k), all contiguous; GATES (N, k) of any strides, or None for weights of 1."""
    strips = tl.cdiv(d, BLOCK_D)
    tokens = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = (tl.program_id(0) % strips).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    present = tokens < n_tokens
    in_row = cols < d
    z = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for slot in range(top_k):
        place = tl.load(PLACES + tokens * top_k + slot, mask=present, other=-1).to(tl.int64)
        served = place >= 0
        y = Y + place[:, None] * d + cols[None, :]
        y = tl.load(y, mask=served[:, None] & in_row[None, :], other=0.0).to(tl.float32)
        if GATES is not None:
            at = tokens * stride_gates_row + tl.cast(slot, tl.int64) * stride_gates_col
            y *= tl.load(GATES + at, mask=served, other=0.0).to(tl.float32)[:, None]
        z += y
    out = Z + tokens[:, None] * d + cols[None, :]
    tl.store(out, z.to(Z.dtype.element_ty), mask=present[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=["n_assignments"])
def _gate_gradient_kernel(DG, PLACES, DGATES, n_assignments, BLOCK_A: tl.constexpr):
    """DGATES (N, k): the rows' gradients DG (A,) in the order of the assignments, 0 for one that was dropped."""
    assignments = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = assignments < n_assignments
    place = tl.load(PLACES + assignments, mask=mask, other=-1).to(tl.int64)
    dg = tl.load(DG + place, mask=place >= 0, other=0.0)
    tl.store(DGATES + assignments, dg.to(DGATES.dtype.element_ty), mask=mask)
