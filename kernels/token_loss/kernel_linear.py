r"""Device code of the losses from hidden states: logits exist only as tiles in registers.

With $h_i$ the rows of hidden states and $w_v$ the rows of the head, $z_{iv}=h_i\cdot w_v$.

Forward (`_linear_statistics_kernel`): a program takes a block of rows and a share of the vocabulary, computes one
tile of $z$ after another, accumulated in fp32, and merges each into the running $(m,s,u)$ of `kernel_tiles.py`. It
writes 4 numbers a row; `_merge_kernel` merges the shares.

Backward: $z$ is computed again, strip of the vocabulary by strip, turned into $\bar z$ in registers
(`_linear_gradient_kernel`) and written, rounded to the dtype of the operands as a matrix product wants it, to a
buffer of one strip. Two products follow: $\bar w_v=\sum_i\bar z_{iv}h_i$, finished within the strip, and
$\bar h_i\mathrel{+}=\sum_v\bar z_{iv}w_v$, carried in fp32 from strip to strip. So four products in all (one forward,
three backward), and the width of a strip changes not one bit: sums run over the same blocks in the same order.

Rows that do not count are never loaded (their lanes hold 0), so NaN in them reaches nothing, the head's gradient
included. No atomics: every element of every result is written by one program.
"""

# Calls between device functions and tl.range are unknown to a type checker.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.device import dot
from kernels.token_loss.kernel_tiles import LOG2, gradient_factors, gradient_tile


@triton.jit
def grouped(program, row_blocks, columns, GROUP: tl.constexpr):
    """Which row block and which column a program takes: GROUP row blocks share the columns that are in cache."""
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def _logits_tile(
    X, W, at_x, keep, cols, V, d, stride_x_col, stride_w_row, stride_w_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of logits in fp32, (BLOCK_M, BLOCK_N). EVEN: d is a multiple of BLOCK_K."""
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    in_head = cols < V
    for start in range(0, d, BLOCK_K):
        ks = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_at = X + at_x[:, None] + ks[None, :] * stride_x_col
        w_at = W + cols[None, :] * stride_w_row + ks[:, None] * stride_w_col
        if EVEN:
            x = tl.load(x_at, mask=keep[:, None], other=0.0)
            w = tl.load(w_at, mask=in_head[None, :], other=0.0)
        else:
            x = tl.load(x_at, mask=keep[:, None] & (ks < d)[None, :], other=0.0)
            w = tl.load(w_at, mask=in_head[None, :] & (ks < d)[:, None], other=0.0)
        z = dot(x, w, z)
    return z


@triton.jit(do_not_specialize=["n_rows", "splits", "tiles_each"])
def _linear_statistics_kernel(
    X, W, TARGET, PART_TOP, PART_SUM, PART_WEIGHTED, PART_MEAN, PART_CHOSEN,
    n_rows, V, d, splits, tiles_each, stride_x_row, stride_x_col, stride_w_row, stride_w_col, scale, ignored,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(m, s, u), the sum of logits and the chosen logit of BLOCK_M rows over one share of the vocabulary.

    PART_WEIGHTED (for the entropy) and PART_MEAN may be None. All parts are (splits, n_rows), contiguous.
    """
    block, split = grouped(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), splits, GROUP)
    rows = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = rows < n_rows
    target = tl.load(TARGET + rows, mask=present, other=ignored)
    keep = target != ignored
    at_x = rows * stride_x_row
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    summed = tl.zeros((BLOCK_M,), tl.float32)
    chosen = tl.zeros((BLOCK_M,), tl.float32)
    split = split.to(tl.int64)
    last = tl.minimum((split + 1) * tiles_each, tl.cdiv(V, BLOCK_N))
    for tile in range(split * tiles_each, last):
        cols = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        z = _logits_tile(
            X, W, at_x, keep, cols, V, d, stride_x_col, stride_w_row, stride_w_col, BLOCK_M, BLOCK_N, BLOCK_K, EVEN
        )
        in_head = (cols < V)[None, :]
        chosen += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), axis=1)
        if PART_MEAN is not None:
            summed += tl.sum(z, axis=1)  # columns beyond the head hold 0
        z = tl.where(in_head, z, -1e20)  # finite, so that 0 times its depth below is 0
        higher = tl.maximum(top, tl.max(z, axis=1))  # finite: every tile has a column, every logit is a sum
        gap = tl.where(top == float("-inf"), 0.0, (top - higher) * scale)
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp2(gap))
        depth = (z - higher[:, None]) * scale
        e = tl.exp2(depth)
        if PART_WEIGHTED is not None:
            here = tl.sum(e * depth, axis=1)
            weighted = shrink * (weighted + gap * total) + here
        total = shrink * total + tl.sum(e, axis=1)
        top = higher
    at = split * n_rows + rows
    tl.store(PART_TOP + at, top, mask=present)
    tl.store(PART_SUM + at, total, mask=present)
    tl.store(PART_CHOSEN + at, chosen, mask=present)
    if PART_WEIGHTED is not None:
        tl.store(PART_WEIGHTED + at, weighted, mask=present)
    if PART_MEAN is not None:
        tl.store(PART_MEAN + at, summed, mask=present)


@triton.jit(do_not_specialize=["n_rows", "splits"])
def _merge_kernel(
    PART_TOP, PART_SUM, PART_WEIGHTED, PART_MEAN, PART_CHOSEN, TARGET,
    LOGP, LSE, ENTROPY, MEAN, TOP, LOG_SUM, n_rows, splits, V, inverse_temperature, scale, ignored,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the shares of BLOCK rows, in order. An empty share is the identity (-inf, 0, 0)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = rows < n_rows
    target = tl.load(TARGET + rows, mask=present, other=ignored)
    keep = target != ignored
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    chosen = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * n_rows + rows
        part = tl.load(PART_TOP + at, mask=present, other=0.0)
        part_sum = tl.load(PART_SUM + at, mask=present, other=1.0)
        higher = tl.maximum(top, part)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        gap = tl.where(top == float("-inf"), 0.0, (top - base) * scale)
        part_gap = tl.where(part == float("-inf"), 0.0, (part - base) * scale)
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp2(gap))
        part_shrink = tl.where(part == float("-inf"), 0.0, tl.exp2(part_gap))
        if PART_WEIGHTED is not None:
            part_weighted = tl.load(PART_WEIGHTED + at, mask=present, other=0.0)
            weighted = shrink * (weighted + gap * total) + part_shrink * (part_weighted + part_gap * part_sum)
        total = shrink * total + part_shrink * part_sum
        top = higher
        chosen += tl.load(PART_CHOSEN + at, mask=present, other=0.0)
        if PART_MEAN is not None:
            summed += tl.load(PART_MEAN + at, mask=present, other=0.0)
    log_sum = tl.log2(total)
    inside = (target >= 0) & (target < V)
    logp = tl.where(inside, (chosen - top) * inverse_temperature - LOG2 * log_sum, float("nan"))
    tl.store(TOP + rows, tl.where(keep, top, 0.0), mask=present)
    tl.store(LOG_SUM + rows, tl.where(keep, log_sum, 0.0), mask=present)
    tl.store(LOGP + rows, tl.where(keep, logp, 0.0), mask=present)
    tl.store(LSE + rows, tl.where(keep, top * inverse_temperature + LOG2 * log_sum, 0.0), mask=present)
    if ENTROPY is not None:
        tl.store(ENTROPY + rows, tl.where(keep, LOG2 * (log_sum - weighted / total), 0.0), mask=present)
    if MEAN is not None:
        tl.store(MEAN + rows, tl.where(keep, summed * inverse_temperature / V, 0.0), mask=present)


@triton.jit(do_not_specialize=["n_rows", "first"])
def _linear_gradient_kernel(
    X, W, TARGET, TOP, LOG_SUM, ENTROPY, A, B, C, D, DZ,
    n_rows, V, d, first, width, stride_x_row, stride_x_col, stride_w_row, stride_w_col,
    inverse_temperature, scale, ignored,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The logits' gradient for columns first ... first + width, into DZ (n_rows, width), contiguous; 0 beyond V."""
    block, tile = grouped(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), width // BLOCK_N, GROUP)
    rows = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = rows < n_rows
    target = tl.load(TARGET + rows, mask=present, other=ignored)
    keep = target != ignored
    here = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = first + here
    z = _logits_tile(
        X, W, rows * stride_x_row, keep, cols, V, d, stride_x_col, stride_w_row, stride_w_col,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN,
    )  # fmt: skip
    top = tl.load(TOP + rows, mask=present, other=0.0)
    log_sum = tl.load(LOG_SUM + rows, mask=present, other=0.0)
    nothing = tl.zeros((BLOCK_M,), tl.float32)
    a, b, c, d_mean, entropy = nothing, nothing, nothing, nothing, nothing
    if A is not None:
        a = tl.load(A + rows, mask=keep, other=0.0)
    if B is not None:
        b = tl.load(B + rows, mask=keep, other=0.0)
        entropy = tl.load(ENTROPY + rows, mask=keep, other=0.0)
    if C is not None:
        c = tl.load(C + rows, mask=keep, other=0.0)
    if D is not None:
        d_mean = tl.load(D + rows, mask=keep, other=0.0)
    at_p, at_plogp, at_target, everywhere = gradient_factors(a, b, c, d_mean, entropy, V, inverse_temperature)
    dz = gradient_tile(
        z, cols, target, top, log_sum, scale, at_p, at_plogp, at_target, everywhere, B is not None, D is not None
    )
    dz = tl.where(keep[:, None] & (cols < V)[None, :], dz, 0.0).to(DZ.dtype.element_ty)
    tl.store(DZ + rows[:, None] * width + here[None, :], dz, mask=present[:, None])


@triton.jit(do_not_specialize=["M", "K"])
def _product_kernel(
    A, B, KEPT, CARRY, OUT, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, ignored,
    CARRIED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """OUT = A B (+ CARRY, when CARRIED), accumulated in fp32; OUT and CARRY are (M, N), contiguous.

    KEPT, where it is not None, holds a target for each of the K rows of B: ignored ones are taken as 0. OUT None
    keeps the sum in CARRY for the next strip.
    """
    row_block, col_block = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < M, cols < N
    mask = in_rows[:, None] & in_cols[None, :]
    at = rows[:, None] * N + cols[None, :]
    if CARRIED:
        total = tl.load(CARRY + at, mask=mask, other=0.0)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        ks = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        in_k = ks < K
        a = tl.load(
            A + rows[:, None] * stride_am + ks[None, :] * stride_ak, mask=in_rows[:, None] & in_k[None, :], other=0.0
        )
        if KEPT is not None:
            in_k = in_k & (tl.load(KEPT + ks, mask=in_k, other=ignored) != ignored)
        b = tl.load(
            B + ks[:, None] * stride_bk + cols[None, :] * stride_bn, mask=in_k[:, None] & in_cols[None, :], other=0.0
        )
        total = dot(a, b, total)
    if OUT is None:
        tl.store(CARRY + at, total, mask=mask)
    else:
        tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=mask)
