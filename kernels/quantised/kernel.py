r"""Device code of products with quantised weights: forward and backward are one kernel.

Mathematics, with codes q, and $s$ the scale of a row (int8) or of 64 neighbours in the flat order of W (NF4):

$$\hat W_{nk}=\mathrm{round}(s\,q_{nk})\ \text{or}\ \mathrm{round}(s\,\mathrm{level}[q_{nk}]),\qquad
y_{mn}=\sum_kx_{mk}\hat W_{nk},\qquad \bar x_{mk}=\sum_n\bar y_{mn}\hat W_{nk}.$$

Both reduce over one axis of W, so both are products of rows A with tiles of W loaded as they lie, (BLOCK_N, BLOCK_K),
and transposed in the forward. With double quantisation $s=s_{\rm meta}q_s+\bar s$ (see minillm.functional.nf4).
Rounding: W is dequantised in fp32 and rounded once to the type of A; sums are fp32 and rounded once.

In the common case a byte is loaded once and gives two neighbours, and a row of a tile has one scale (BLOCK_K divides
the block, which divides K): WHOLE. Otherwise a code and a scale are loaded for every weight, and blocks may run over the end of a row.
Bytes: `traffic.py`.
"""

# Triton's types are not those that a type checker sees in device code.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from kernels.device import dot

INT8, NF4, NF4_DOUBLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _scales(SCALE, META, mean, at, mask, FORMAT: tl.constexpr, META_BLOCK: tl.constexpr):
    """The scales at these places; the second quantisation is undone in the words of its equation."""
    scale = tl.load(SCALE + at, mask=mask, other=0).to(tl.float32)
    if FORMAT == NF4_DOUBLE:
        scale = scale * tl.load(META + at // META_BLOCK, mask=mask, other=0.0) + mean
    return scale


@triton.jit
def _weights(
    CODES, SCALE, META, LEVELS, mean, first_n, first_k, N, K,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, META_BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of W in fp32, 0 outside of W."""
    rows = (first_n.to(tl.int64) + tl.arange(0, BLOCK_N))[:, None]
    cols = (first_k.to(tl.int64) + tl.arange(0, BLOCK_K))[None, :]
    inside = (rows < N) & (cols < K)
    if FORMAT == INT8:
        q = tl.load(CODES + rows * K + cols, mask=inside, other=0).to(tl.float32)
        return q * tl.load(SCALE + rows, mask=rows < N, other=0.0)
    if WHOLE:
        pairs = (first_k.to(tl.int64) // 2 + tl.arange(0, BLOCK_K // 2))[None, :]
        both = tl.load(CODES + rows * (K // 2) + pairs, mask=(rows < N) & (pairs < K // 2), other=0).to(tl.int32)
        q = tl.interleave(both >> 4, both & 15)
        at = (rows * K + first_k) // BLOCK
        scale = _scales(SCALE, META, mean, at, (rows < N) & (first_k < K), FORMAT, META_BLOCK)
    else:
        flat = rows * K + cols
        both = tl.load(CODES + flat // 2, mask=inside, other=0).to(tl.int32)
        q = tl.where(flat % 2 == 0, both >> 4, both & 15)
        scale = _scales(SCALE, META, mean, flat // BLOCK, inside, FORMAT, META_BLOCK)
    return tl.where(inside, tl.load(LEVELS + q) * scale, 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def _product_kernel(
    A, CODES, SCALE, META, LEVELS, OUT, mean, n_rows, N, K, stride_a_row, stride_a_col,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, META_BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    BACKWARD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_REDUCED: tl.constexpr,
):  # fmt: skip
    """A tile of A W^T (reduced over K), or backward of A W (reduced over N). OUT is contiguous."""
    width, length = (K, N) if BACKWARD else (N, K)
    strips = tl.cdiv(width, BLOCK_OUT)
    rows = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = (tl.program_id(0) % strips) * BLOCK_OUT
    outs = first.to(tl.int64) + tl.arange(0, BLOCK_OUT)
    reduced = tl.arange(0, BLOCK_REDUCED).to(tl.int64)
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for step in range(tl.cdiv(length, BLOCK_REDUCED)):
        start = first * 0 + step * BLOCK_REDUCED
        places = reduced + start
        mask = (rows < n_rows)[:, None] & (places < length)[None, :]
        a = tl.load(A + rows[:, None] * stride_a_row + places[None, :] * stride_a_col, mask=mask, other=0.0)
        if BACKWARD:
            w = _weights(CODES, SCALE, META, LEVELS, mean, start, first, N, K, FORMAT, BLOCK, META_BLOCK, WHOLE,
                         BLOCK_REDUCED, BLOCK_OUT)  # fmt: skip
        else:
            w = tl.trans(_weights(CODES, SCALE, META, LEVELS, mean, first, start, N, K, FORMAT, BLOCK, META_BLOCK, WHOLE,
                                  BLOCK_OUT, BLOCK_REDUCED))  # fmt: skip
        total = dot(a, w.to(a.dtype), total)
    inside = (rows < n_rows)[:, None] & (outs < width)[None, :]
    tl.store(OUT + rows[:, None] * width + outs[None, :], total.to(OUT.dtype.element_ty), mask=inside)
