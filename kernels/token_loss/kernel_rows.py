r"""Device code over existing logits: statistics, gradient, and both in one launch.

The mathematics is in `kernel_tiles.py`. A program owns BLOCK_ROWS rows (grid axis 0, so any number of them); a row
longer than a tile is walked tile by tile. Rows whose target is IGNORED are not read at all: their statistics are 0
and their gradient is 0, whatever they hold.

Saved for the backward: the logits themselves (which the gradient may overwrite: each program reads a tile before
it writes it, and rows belong to one program) and, per row, the largest logit and the base-2 logarithm of the sum, 8
bytes. Keeping the two apart instead of their sum costs nothing and saves the digits that large logits would lose.

Bytes: statistics read every logit once. The gradient reads and writes each once. `_loss_kernel` does both in one
launch: a row that fits in a tile stays in registers; a longer one is read a second time while the second-level
cache still has it (one row of 128k bf16 logits is 256 KB, 132 of them in flight are 34 MB of 50), so that main
memory sees one read and one write. The hints ask the cache to keep the first reading and to drop the second.
"""

# Calls between device functions and tl.range are unknown to a type checker.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from kernels.token_loss.kernel_tiles import (
    LOG2,
    absorb,
    gradient_factors,
    gradient_tile,
    likelihood_terms,
    merge_lanes,
    policy_terms,
)


@triton.jit
def _scan(
    X, at, keep, V, stride_col, scale,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
    LANE: tl.constexpr, PACKED: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Read whole rows once: largest logit, log2 of the sum, entropy in nats, mean logit. AGAIN: they will be read again."""
    LANES: tl.constexpr = BLOCK_V // LANE
    top = tl.full((BLOCK_ROWS, LANES), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS, LANES), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS, LANES), tl.float32)
    logits = tl.zeros((BLOCK_ROWS, LANES), tl.float32)
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        if PACKED:
            inside = tl.arange(0, LANES)[:, None] * LANE + tl.arange(0, LANE)[None, :]
        else:
            inside = tl.arange(0, LANES)[:, None] + tl.arange(0, LANE)[None, :] * LANES
        cols = (start + inside).to(tl.int64)  # (LANES, LANE)
        mask = keep[:, None, None] & (cols < V)[None, :, :]  # (BLOCK_ROWS, LANES, LANE)
        where = X + at[:, None, None] + cols[None, :, :] * stride_col
        if AGAIN:
            x = tl.load(where, mask=mask, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        else:
            x = tl.load(where, mask=mask, other=float("-inf")).to(tl.float32)
        if MEAN:
            logits += tl.sum(tl.where(mask, x, 0.0), axis=2)
        top, total, weighted = absorb(x, top, total, weighted, scale, ENTROPY)
    top_row, s, u = merge_lanes(top, total, weighted, scale)
    log_sum = tl.log2(s)
    return top_row, log_sum, LOG2 * (log_sum - u / s), tl.sum(logits, axis=1) / V


@triton.jit(do_not_specialize=["n_rows"])
def _statistics_kernel(
    X, TARGET, LOGP, LSE, ENTROPY, MEAN, TOP, LOG_SUM,
    n_rows, V, stride_row, stride_col, inverse_temperature, scale, ignored,
    BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr, LANE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Log-prob of the target, log-sum-exp, entropy (None: not wanted) and mean tempered logit (None) of every row."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = rows < n_rows
    target = tl.load(TARGET + rows, mask=present, other=ignored)
    keep = target != ignored
    inside = keep & (target >= 0) & (target < V)
    at = rows * stride_row
    # An id outside the vocabulary reads nothing and makes its row NaN: loud, and without a look at the device.
    chosen = tl.load(X + at + target.to(tl.int64) * stride_col, mask=inside, other=float("nan")).to(tl.float32)
    top, log_sum, entropy, mean = _scan(
        X,
        at,
        keep,
        V,
        stride_col,
        scale,
        ENTROPY is not None,
        MEAN is not None,
        BLOCK_ROWS,
        BLOCK_V,
        STAGES,
        LANE,
        PACKED,
        False,
    )
    tl.store(TOP + rows, tl.where(keep, top, 0.0), mask=present)
    tl.store(LOG_SUM + rows, tl.where(keep, log_sum, 0.0), mask=present)
    tl.store(LOGP + rows, tl.where(keep, (chosen - top) * inverse_temperature - LOG2 * log_sum, 0.0), mask=present)
    tl.store(LSE + rows, tl.where(keep, top * inverse_temperature + LOG2 * log_sum, 0.0), mask=present)
    if ENTROPY is not None:
        tl.store(ENTROPY + rows, tl.where(keep, entropy, 0.0), mask=present)
    if MEAN is not None:
        tl.store(MEAN + rows, tl.where(keep, mean * inverse_temperature, 0.0), mask=present)


@triton.jit
def _spread(
    X, DX, at, at_dx, present, keep, target, V, stride_col, stride_dx_col, top, log_sum, scale,
    at_p, at_plogp, at_target, everywhere,
    ENTROPY: tl.constexpr, MEAN: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of whole rows, reading the logits tile by tile; exactly 0 where the row does not count."""
    for start in tl.range(0, V, BLOCK_V, num_stages=STAGES):
        cols = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        in_row = (cols < V)[None, :]
        where = X + at[:, None] + cols[None, :] * stride_col
        x = tl.load(where, mask=keep[:, None] & in_row, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dx = gradient_tile(
            x, cols, target, top, log_sum, scale, at_p, at_plogp, at_target, everywhere, ENTROPY, MEAN
        )  # (BLOCK_ROWS, BLOCK_V)
        dx = tl.where(keep[:, None], dx, 0.0).to(DX.dtype.element_ty)
        tl.store(DX + at_dx[:, None] + cols[None, :] * stride_dx_col, dx, mask=present[:, None] & in_row)


@triton.jit(do_not_specialize=["n_rows"])
def _gradient_kernel(
    X, TARGET, TOP, LOG_SUM, ENTROPY, A, B, C, D, DX,
    n_rows, V, stride_row, stride_col, stride_dx_row, stride_dx_col, inverse_temperature, scale, ignored,
    BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits from the derivatives A by log-prob, B by entropy, C by log-sum-exp, D by the mean.

    Each of the four is None where nothing arrives. DX may be X.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = rows < n_rows
    target = tl.load(TARGET + rows, mask=present, other=ignored)
    keep = target != ignored
    top = tl.load(TOP + rows, mask=present, other=0.0)
    log_sum = tl.load(LOG_SUM + rows, mask=present, other=0.0)
    nothing = tl.zeros((BLOCK_ROWS,), tl.float32)
    a, b, c, d, entropy = nothing, nothing, nothing, nothing, nothing
    if A is not None:
        a = tl.load(A + rows, mask=keep, other=0.0)
    if B is not None:
        b = tl.load(B + rows, mask=keep, other=0.0)
        entropy = tl.load(ENTROPY + rows, mask=keep, other=0.0)
    if C is not None:
        c = tl.load(C + rows, mask=keep, other=0.0)
    if D is not None:
        d = tl.load(D + rows, mask=keep, other=0.0)
    at_p, at_plogp, at_target, everywhere = gradient_factors(a, b, c, d, entropy, V, inverse_temperature)
    _spread(
        X, DX, rows * stride_row, rows * stride_dx_row, present, keep, target, V, stride_col, stride_dx_col,
        top, log_sum, scale, at_p, at_plogp, at_target, everywhere, B is not None, D is not None, BLOCK_V, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _loss_kernel(
    X, TARGET, WEIGHT, OLD, REF, ADVANTAGE, IMPORTANCE, DX,
    VALUE, LOGP, LSE, ENTROPY, RATIO, FLAG, K1, K2, K3,
    n_rows, V, stride_row, stride_col, stride_dx_row, stride_dx_col, inverse_temperature, scale, ignored,
    smoothing, z_loss, low, high, dual, beta, entropy_coef,
    POLICY: tl.constexpr, SMOOTH: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, BONUS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr, LANE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Loss and gradient in one launch: every row's statistics, its term, and at once the gradient of its logits.

    POLICY chooses the clipped policy loss (OLD, ADVANTAGE and perhaps REF and IMPORTANCE given; what follows LOGP is
    written) or the likelihood loss (they are None). BONUS says that the entropy has a derivative. WHOLE keeps rows that fit in
    one tile in registers between the two halves. DX may be X.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = rows < n_rows
    target = tl.load(TARGET + rows, mask=present, other=ignored)
    keep = target != ignored
    inside = keep & (target >= 0) & (target < V)
    at = rows * stride_row
    chosen = tl.load(X + at + target.to(tl.int64) * stride_col, mask=inside, other=float("nan")).to(tl.float32)
    cols = tl.arange(0, BLOCK_V).to(tl.int64)
    in_row = (cols < V)[None, :]
    if WHOLE:
        x = tl.load(X + at[:, None] + cols[None, :] * stride_col, mask=keep[:, None] & in_row, other=float("-inf")).to(
            tl.float32
        )
        top = tl.max(x, axis=1)
        top = tl.where(top == float("-inf"), 0.0, top)
        depth = (x - top[:, None]) * scale
        e = tl.exp2(depth)
        s = tl.sum(e, axis=1)
        log_sum = tl.log2(s)
        entropy = log_sum
        if POLICY:
            entropy = LOG2 * (log_sum - tl.sum(e * tl.where(depth == float("-inf"), 0.0, depth), axis=1) / s)
        mean = log_sum
        if SMOOTH:
            mean = tl.sum(tl.where(keep[:, None] & in_row, x, 0.0), axis=1) / V
    else:
        top, log_sum, entropy, mean = _scan(
            X, at, keep, V, stride_col, scale, POLICY, SMOOTH, BLOCK_ROWS, BLOCK_V, STAGES, LANE, PACKED, True
        )
    logp = tl.where(keep, (chosen - top) * inverse_temperature - LOG2 * log_sum, 0.0)
    lse = tl.where(keep, top * inverse_temperature + LOG2 * log_sum, 0.0)
    entropy = tl.where(keep, entropy, 0.0)
    weight = tl.load(WEIGHT + rows, mask=keep, other=0.0)
    nothing = tl.zeros((BLOCK_ROWS,), tl.float32)
    b, c, d = nothing, nothing, nothing
    if POLICY:
        old = tl.load(OLD + rows, mask=keep, other=0.0)
        advantage = tl.load(ADVANTAGE + rows, mask=keep, other=0.0)
        ref = logp
        if REF is not None:
            ref = tl.load(REF + rows, mask=keep, other=0.0)
        importance = nothing + 1.0
        if IMPORTANCE is not None:
            importance = tl.load(IMPORTANCE + rows, mask=keep, other=0.0)
        value, a, b, ratio, flag, k1, k2, k3 = policy_terms(
            logp, entropy, old, ref, advantage, weight, importance, low, high, dual, beta, entropy_coef,
            REF is not None, KL, KL_RATIO,
        )  # fmt: skip
        tl.store(ENTROPY + rows, entropy, mask=present)
        tl.store(RATIO + rows, tl.where(keep, ratio, 0.0), mask=present)
        tl.store(FLAG + rows, tl.where(keep, flag, 0).to(tl.int8), mask=present)
        tl.store(K1 + rows, tl.where(keep, k1, 0.0), mask=present)
        tl.store(K2 + rows, tl.where(keep, k2, 0.0), mask=present)
        tl.store(K3 + rows, tl.where(keep, k3, 0.0), mask=present)
    else:
        value, a, c, d = likelihood_terms(logp, lse, mean * inverse_temperature, weight, smoothing, z_loss)
    tl.store(VALUE + rows, tl.where(keep, value, 0.0), mask=present)
    tl.store(LOGP + rows, logp, mask=present)
    tl.store(LSE + rows, lse, mask=present)

    at_p, at_plogp, at_target, everywhere = gradient_factors(a, b, c, d, entropy, V, inverse_temperature)
    at_dx = rows * stride_dx_row
    if WHOLE:
        dx = gradient_tile(x, cols, target, top, log_sum, scale, at_p, at_plogp, at_target, everywhere, BONUS, SMOOTH)
        dx = tl.where(keep[:, None], dx, 0.0).to(DX.dtype.element_ty)
        tl.store(DX + at_dx[:, None] + cols[None, :] * stride_dx_col, dx, mask=present[:, None] & in_row)
    else:
        _spread(
            X, DX, at, at_dx, present, keep, target, V, stride_col, stride_dx_col,
            top, log_sum, scale, at_p, at_plogp, at_target, everywhere, BONUS, SMOOTH, BLOCK_V, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _scale_kernel(X, FACTOR, n_rows, V, stride_row, stride_col, BLOCK_V: tl.constexpr):
    """Multiply a finished gradient by what arrives at the loss; when that is 1, as nearly always, touch nothing."""
    factor = tl.load(FACTOR).to(tl.float32)
    if factor != 1.0:
        row = tl.program_id(0).to(tl.int64)
        for start in range(0, V, BLOCK_V):
            cols = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
            where = X + row * stride_row + cols * stride_col
            x = tl.load(where, mask=cols < V, other=0.0).to(tl.float32)
            tl.store(where, (x * factor).to(X.dtype.element_ty), mask=cols < V)
