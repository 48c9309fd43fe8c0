r"""Device code of the norms: one family, because LayerNorm is RMSNorm of the centred row.

Mathematics, for one row $x\in\mathbb R^d$ (with the residual branch, $x$ is the sum $s=x+r$):

$$\mu=\tfrac1d\textstyle\sum_i x_i\ (\text{LayerNorm; 0 for RMSNorm}),\qquad
  \rho=1/\sqrt{\tfrac1d\textstyle\sum_i(x_i-\mu)^2+\varepsilon_0},\qquad
  \hat x=\rho\,(x-\mu),\qquad y=g\odot\hat x+b.$$

Backward, with $\hat g=g\odot\bar y$ and a bar over a product for its mean over the row:

$$\bar x=\rho\,(\hat g-\hat x\,\overline{\hat g\odot\hat x}-\overline{\hat g}\,)+\bar s,\qquad
  \bar g=\sum_{\rm rows}\bar y\odot\hat x,\qquad \bar b=\sum_{\rm rows}\bar y .$$

The term $\overline{\hat g}$ belongs to the mean, so RMSNorm lacks it; $\bar s$ is what arrives at the sum itself.

Saved for the backward: the row that was normalised (an input or output anyway, so it costs nothing) and
$\rho$, $\mu$ as fp32, 4 bytes each a row. $\hat x$ is computed again: one multiplication against 2 to 4 bytes
an element of memory traffic.

Masked lanes load 0, which adds nothing to any sum. Rounding: every load is converted to fp32 and every reduction is fp32; each output is rounded once, when it is
stored. The one exception is intended: the sum $s$ is rounded to its own dtype *before* it is normalised, so
that the norm, its backward and the next layer all see the same $s$.

Bytes: forward reads and writes each element once, backward reads two and writes one (`traffic.py`), as long as
a row fits in one tile. Longer rows are read twice (`*_long_*`).

Offsets: a row index is widened to int64 before it meets a stride, and so is a column index, because
`stride * index` wraps silently past 2^31. Strides of 1 arrive as constants, so contiguous rows still load
16 bytes at a time.

Determinism: no atomics. Each backward program walks its own rows in a fixed order, keeps its share of
$\bar g$ and $\bar b$ in registers, writes it to its own row of a buffer, and a second kernel adds the
buffer up in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
    X, R, G, B, S, Y, MEAN, RHO,
    n_rows, d, stride_x_row, stride_x_col, stride_r_row, stride_r_col, stride_g, stride_b, eps,
    CENTRED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalise BLOCK_ROWS whole rows that stay in registers between the reduction and the store.

    R and S are None without a residual branch, B is None without a shift, MEAN is None for RMSNorm.
    S, Y (n_rows, d) and MEAN, RHO (n_rows,) are contiguous; everything else has strides.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    in_row = cols < d
    mask = (rows < n_rows)[:, None] & in_row[None, :]  # (BLOCK_ROWS, BLOCK_D)
    out = rows[:, None] * d + cols[None, :]

    at = rows[:, None] * stride_x_row + cols[None, :] * stride_x_col
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    # The gain is asked for early, so that it arrives during the sums.
    g = tl.load(G + cols * stride_g, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if R is not None:
        at = rows[:, None] * stride_r_row + cols[None, :] * stride_r_col
        r = tl.load(R + at, mask=mask, other=0.0).to(tl.float32)
        rounded = (x + r).to(S.dtype.element_ty)
        tl.store(S + out, rounded, mask=mask)
        x = rounded.to(tl.float32)

    if CENTRED:
        mean = tl.sum(x, axis=1) / d
        tl.store(MEAN + rows, mean, mask=rows < n_rows)
        x = tl.where(mask, x - mean[:, None], 0.0)
    rho = tl.rsqrt(tl.sum(x * x, axis=1) / d + eps)
    tl.store(RHO + rows, rho, mask=rows < n_rows)

    y = x * rho[:, None] * g
    if B is not None:
        y += tl.load(B + cols * stride_b, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + out, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _forward_long_kernel(
    X, R, G, B, S, Y, MEAN, RHO,
    n_rows, d, stride_x_row, stride_x_col, stride_r_row, stride_r_col, stride_g, stride_b, eps,
    CENTRED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalise one row that is longer than a tile: once through it for the sums, once more to write.

    The second reading mostly hits the cache. LayerNorm's mean and sum of squares are merged tile by tile
    (count, mean, sum of squared deviations), which unlike E[x^2] - E[x]^2 loses nothing to cancellation.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = X + row * stride_x_row
    y_row = Y + row * d
    columns = tl.arange(0, BLOCK_D)

    seen = 0.0
    mean = 0.0
    squares = 0.0
    for start in range(0, d, BLOCK_D):
        cols = (start + columns).to(tl.int64)
        mask = cols < d
        x = tl.load(x_row + cols * stride_x_col, mask=mask, other=0.0).to(tl.float32)
        if R is not None:
            r = tl.load(R + row * stride_r_row + cols * stride_r_col, mask=mask, other=0.0).to(tl.float32)
            rounded = (x + r).to(S.dtype.element_ty)
            tl.store(S + row * d + cols, rounded, mask=mask)
            x = rounded.to(tl.float32)
        if CENTRED:
            here = tl.minimum(d - start, BLOCK_D).to(tl.float32)
            mean_here = tl.sum(x, axis=0) / here
            shift = mean_here - mean
            share = here / (seen + here)
            x = tl.where(mask, x - mean_here, 0.0)
            squares += tl.sum(x * x, axis=0) + shift * shift * seen * share
            mean += shift * share
            seen += here
        else:
            squares += tl.sum(x * x, axis=0)
    rho = tl.rsqrt(squares / d + eps)
    tl.store(RHO + row, rho)
    if CENTRED:
        tl.store(MEAN + row, mean)
    if R is not None:
        tl.debug_barrier()  # every thread's part of S must be visible before other threads read it back

    for start in range(0, d, BLOCK_D):
        cols = (start + columns).to(tl.int64)
        mask = cols < d
        if R is not None:
            x = tl.load(S + row * d + cols, mask=mask, other=0.0).to(tl.float32)
        else:
            x = tl.load(x_row + cols * stride_x_col, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean) * rho * tl.load(G + cols * stride_g, mask=mask, other=0.0).to(tl.float32)
        if B is not None:
            y += tl.load(B + cols * stride_b, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_row + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    DY, DS, X, G, MEAN, RHO, DX, PARTIAL_G, PARTIAL_B,
    n_rows, d, stride_dy_row, stride_dy_col, stride_ds_row, stride_ds_col, stride_x_row, stride_x_col, stride_g,
    CENTRED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pull cotangents of whole rows back to dx, and add up this program's share of dg and db.

    A fixed number of programs walks the rows in strides, so the buffer of shares does not grow with the rows.
    DS is None where nothing arrives at the sum s, PARTIAL_B where there is no shift. DX is contiguous.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    in_row = cols < d
    g = tl.load(G + cols * stride_g, mask=in_row, other=0.0).to(tl.float32)[None, :]
    dg = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    db = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)

    for block in tl.range(program, tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        present = rows < n_rows
        mask = present[:, None] & in_row[None, :]  # (BLOCK_ROWS, BLOCK_D)
        at = rows[:, None] * stride_x_row + cols[None, :] * stride_x_col
        x_hat = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
        at = rows[:, None] * stride_dy_row + cols[None, :] * stride_dy_col
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        rho = tl.load(RHO + rows, mask=present, other=0.0)[:, None]
        if CENTRED:
            x_hat -= tl.load(MEAN + rows, mask=present, other=0.0)[:, None]
        x_hat *= rho  # not 0 outside the mask, but dy and g are

        dg += dy * x_hat
        db += dy
        g_hat = dy * g
        dx = g_hat - x_hat * (tl.sum(g_hat * x_hat, axis=1) / d)[:, None]
        if CENTRED:
            dx -= (tl.sum(g_hat, axis=1) / d)[:, None]
        dx *= rho
        if DS is not None:
            at = rows[:, None] * stride_ds_row + cols[None, :] * stride_ds_col
            dx += tl.load(DS + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + rows[:, None] * d + cols[None, :], dx.to(DX.dtype.element_ty), mask=mask)

    share = program.to(tl.int64) * d + cols
    tl.store(PARTIAL_G + share, tl.sum(dg, axis=0), mask=in_row)
    if PARTIAL_B is not None:
        tl.store(PARTIAL_B + share, tl.sum(db, axis=0), mask=in_row)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_long_means_kernel(
    DY, X, G, MEAN, RHO, MEAN_GX, MEAN_G,
    n_rows, d, stride_dy_row, stride_dy_col, stride_x_row, stride_x_col, stride_g,
    CENTRED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First half of the backward of a row longer than a tile: its two means, of g_hat x_hat and of g_hat."""
    row = tl.program_id(0).to(tl.int64)
    rho = tl.load(RHO + row)
    mean = 0.0
    if CENTRED:
        mean = tl.load(MEAN + row)
    sum_gx = tl.zeros((BLOCK_D,), tl.float32)
    sum_g = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = cols < d
        dy = tl.load(DY + row * stride_dy_row + cols * stride_dy_col, mask=mask, other=0.0).to(tl.float32)
        g_hat = dy * tl.load(G + cols * stride_g, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + row * stride_x_row + cols * stride_x_col, mask=mask, other=0.0).to(tl.float32)
        x_hat = (x - mean) * rho
        sum_gx += g_hat * x_hat  # g_hat is 0 outside the mask
        sum_g += g_hat
    tl.store(MEAN_GX + row, tl.sum(sum_gx, axis=0) / d)
    if CENTRED:
        tl.store(MEAN_G + row, tl.sum(sum_g, axis=0) / d)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_long_kernel(
    DY, DS, X, G, MEAN, RHO, MEAN_GX, MEAN_G, DX, PARTIAL_G, PARTIAL_B,
    n_rows, d, stride_dy_row, stride_dy_col, stride_ds_row, stride_ds_col, stride_x_row, stride_x_col, stride_g,
    CENTRED: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Second half: with the row means known, columns are independent, so a program owns a strip of columns.

    Program p walks every `walkers`-th row of strip `p % strips` and keeps dg and db of the strip in registers.
    """
    strips = tl.cdiv(d, BLOCK_D)
    strip = tl.program_id(0) % strips
    walker = tl.program_id(0) // strips
    cols = (strip * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = cols < d
    g = tl.load(G + cols * stride_g, mask=mask, other=0.0).to(tl.float32)
    dg = tl.zeros((BLOCK_D,), tl.float32)
    db = tl.zeros((BLOCK_D,), tl.float32)

    for index in tl.range(walker, n_rows, tl.num_programs(0) // strips, num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        x_hat = tl.load(X + row * stride_x_row + cols * stride_x_col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * stride_dy_row + cols * stride_dy_col, mask=mask, other=0.0).to(tl.float32)
        rho = tl.load(RHO + row)
        if CENTRED:
            x_hat -= tl.load(MEAN + row)
        x_hat *= rho
        dg += dy * x_hat
        db += dy
        dx = dy * g - x_hat * tl.load(MEAN_GX + row)
        if CENTRED:
            dx -= tl.load(MEAN_G + row)
        dx *= rho
        if DS is not None:
            dx += tl.load(DS + row * stride_ds_row + cols * stride_ds_col, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + row * d + cols, dx.to(DX.dtype.element_ty), mask=mask)

    share = walker.to(tl.int64) * d + cols
    tl.store(PARTIAL_G + share, dg, mask=mask)
    if PARTIAL_B is not None:
        tl.store(PARTIAL_B + share, db, mask=mask)


@triton.jit(do_not_specialize=["n_shares"])
def _sum_shares_kernel(
    PARTIAL_G, PARTIAL_B, DG, DB, n_shares, d,
    BLOCK_SHARES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dg and db: add the programs' shares, always in the same order. PARTIAL_B and DB are None without a shift."""
    cols = (tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)).to(tl.int64)
    in_row = cols < d
    dg = tl.zeros((BLOCK_SHARES, BLOCK_COLS), tl.float32)
    db = tl.zeros((BLOCK_SHARES, BLOCK_COLS), tl.float32)
    for start in range(0, n_shares, BLOCK_SHARES):
        shares = (start + tl.arange(0, BLOCK_SHARES)).to(tl.int64)
        mask = (shares < n_shares)[:, None] & in_row[None, :]
        at = shares[:, None] * d + cols[None, :]
        dg += tl.load(PARTIAL_G + at, mask=mask, other=0.0)
        if PARTIAL_B is not None:
            db += tl.load(PARTIAL_B + at, mask=mask, other=0.0)
    tl.store(DG + cols, tl.sum(dg, axis=0).to(DG.dtype.element_ty), mask=in_row)
    if PARTIAL_B is not None:
        tl.store(DB + cols, tl.sum(db, axis=0).to(DB.dtype.element_ty), mask=in_row)
