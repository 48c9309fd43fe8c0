"""Launching the norm kernels on tensors that `op.py` has checked: rows, strides, buffers, grids."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import triton
from torch import Tensor

from kernels import launching
from kernels.launching import FUSED_MULTIPLY_ADD, multiprocessors, on, rows_of
from kernels.norm import kernel as device_code
from kernels.norm.config import SUM_TILE, BackwardPlan, Tile, backward_plan, forward_tile

kernel: Any = device_code  # what triton.jit returns, no type checker follows


def forward(
    x: Tensor, r: Tensor | None, g: Tensor, b: Tensor | None, eps: float, centred: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Normalise the rows of x (or of x + r): y, the sum s if there is an r, and the statistics mean and rho.

    Shapes: x (..., d), r like x, g (d,), b (d,) -> y (..., d), s (..., d), mean (n_rows,), rho (n_rows,)
    """
    d, rows = x.shape[-1], rows_of(x)
    n_rows = len(rows)
    y = launching.empty(x.shape, x.dtype, x.device)
    s = None if r is None else launching.empty(x.shape, x.dtype, x.device)
    mean = launching.empty((n_rows,), torch.float32, x.device) if centred else None
    rho = launching.empty((n_rows,), torch.float32, x.device)
    if x.numel() == 0:
        return y, s, mean, rho
    tile = tile or forward_tile(d)
    branch = None if r is None else rows_of(r)
    arguments = (
        rows, branch, g, b, s, y, mean, rho,
        n_rows, d, *rows.stride(), *((0, 0) if branch is None else branch.stride()),
        g.stride(0), 0 if b is None else b.stride(0), eps,
    )  # fmt: skip
    with on(x):
        if tile.covers(d):
            kernel._forward_kernel[(triton.cdiv(n_rows, tile.block_rows),)](
                *arguments, CENTRED=centred, BLOCK_ROWS=tile.block_rows, BLOCK_D=tile.block_d,
                num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
        else:
            kernel._forward_long_kernel[(n_rows,)](
                *arguments, CENTRED=centred, BLOCK_D=tile.block_d,
                num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
            )  # fmt: skip
    return y, s, mean, rho


def backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, g: Tensor, mean: Tensor | None, rho: Tensor,
    shift_dtype: torch.dtype | None, plan: BackwardPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Pull dy (and ds, what arrives at the sum itself) back: dx, dg and, where there is a shift, db.

    Shapes: dy (..., d), ds (..., d), x (..., d) the rows that were normalised, g (d,) -> dx (..., d), dg (d,), db (d,)
    """
    d, rows = x.shape[-1], rows_of(x)
    n_rows = len(rows)
    dx = launching.empty(x.shape, x.dtype, x.device)
    dg = launching.empty(g.shape, g.dtype, g.device)
    db = None if shift_dtype is None else launching.empty(g.shape, shift_dtype, g.device)
    if x.numel() == 0:
        return dx, dg.zero_(), None if db is None else db.zero_()
    if plan is None:
        plan = backward_plan(
            n_rows, d, x.element_size(), multiprocessors(x.device), centred=mean is not None, residual=ds is not None
        )
    tile = plan.tile
    shares_g = launching.empty((plan.programs, d), torch.float32, x.device)
    shares_b = None if db is None else launching.empty((plan.programs, d), torch.float32, x.device)
    dy_rows, ds_rows = rows_of(dy), None if ds is None else rows_of(ds)
    strides = (
        *dy_rows.stride(), *((0, 0) if ds_rows is None else ds_rows.stride()), *rows.stride(), g.stride(0),
    )  # fmt: skip
    launch = {"num_warps": tile.warps, "num_stages": 1, **FUSED_MULTIPLY_ADD}
    with on(x):
        if tile.covers(d):
            kernel._backward_kernel[(plan.programs,)](
                dy_rows, ds_rows, rows, g, mean, rho, dx, shares_g, shares_b, n_rows, d, *strides,
                CENTRED=mean is not None, BLOCK_ROWS=tile.block_rows, BLOCK_D=tile.block_d, STAGES=tile.stages,
                **launch,
            )  # fmt: skip
        else:
            means = plan.means or tile
            mean_gx = launching.empty((n_rows,), torch.float32, x.device)
            mean_g = None if mean is None else launching.empty((n_rows,), torch.float32, x.device)
            kernel._backward_long_means_kernel[(n_rows,)](
                dy_rows, rows, g, mean, rho, mean_gx, mean_g, n_rows, d, *strides[:2], *strides[4:],
                CENTRED=mean is not None, BLOCK_D=means.block_d, **{**launch, "num_warps": means.warps},
            )  # fmt: skip
            kernel._backward_long_kernel[(plan.programs * triton.cdiv(d, tile.block_d),)](
                dy_rows, ds_rows, rows, g, mean, rho, mean_gx, mean_g, dx, shares_g, shares_b, n_rows, d, *strides,
                CENTRED=mean is not None, BLOCK_D=tile.block_d, STAGES=tile.stages, **launch,
            )  # fmt: skip
        kernel._sum_shares_kernel[(triton.cdiv(d, SUM_TILE.block_d),)](
            shares_g, shares_b, dg, db, plan.programs, d,
            BLOCK_SHARES=SUM_TILE.block_rows, BLOCK_COLS=SUM_TILE.block_d,
            num_warps=SUM_TILE.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return dx, dg, db
