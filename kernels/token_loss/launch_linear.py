"""Launching the fused linear loss on tensors that `op.py` has checked: parts, strips of the vocabulary, grids."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import launching
from kernels.launching import FUSED_MULTIPLY_ADD, multiprocessors, on, rows_of
from kernels.token_loss import kernel_linear
from kernels.token_loss.config import TOKENS, LinearPlan, LinearTile, linear_plan
from kernels.token_loss.launch import LOG2_E, Statistics

code: Any = kernel_linear  # what triton.jit returns, no type checker follows


def plan_for(hidden: Tensor, weight: Tensor) -> LinearPlan:
    """The configuration for these operands."""
    V, d = weight.shape
    return linear_plan(
        hidden.numel() // d, d, V, weight.element_size(), multiprocessors(weight.device), _target(weight.device)
    )


@functools.cache
def _target(device: torch.device) -> str:
    """The architecture that a configuration is chosen for."""
    if launching.INTERPRETED:
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major >= 10 else "sm_80")


def _sizes(tile: LinearTile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": tile.group,
        "num_warps": tile.warps, "num_stages": tile.stages, **FUSED_MULTIPLY_ADD,
    }  # fmt: skip


def statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, ignored: int,
    entropy: bool = True, mean: bool = False, plan: LinearPlan | None = None,
) -> Statistics:  # fmt: skip
    """The statistics of the logits hidden @ weight.T, which are never stored. targets (n_rows,) contiguous."""
    V, d = weight.shape
    rows, n_rows = rows_of(hidden), targets.numel()

    def column(wanted: bool = True, parts: int = 0) -> Any:
        shape = (parts, n_rows) if parts else (n_rows,)
        return launching.empty(shape, torch.float32, hidden.device) if wanted else None

    found = Statistics(column(), column(), column(entropy), column(mean), column(), column())
    if n_rows == 0:
        return found
    plan = plan or plan_for(hidden, weight)
    tile = plan.forward
    tiles = triton.cdiv(V, tile.block_n)
    each = triton.cdiv(tiles, plan.splits)
    splits = triton.cdiv(tiles, each)
    parts = [column(wanted, splits) for wanted in (True, True, entropy, mean, True)]
    with on(hidden):
        code._linear_statistics_kernel[(triton.cdiv(n_rows, tile.block_m) * splits,)](
            rows, weight, targets, *parts, n_rows, V, d, splits, each, *rows.stride(), *weight.stride(),
            LOG2_E / temperature, ignored, EVEN=d % tile.block_k == 0, **_sizes(tile),
        )  # fmt: skip
        code._merge_kernel[(triton.cdiv(n_rows, TOKENS),)](
            *parts, targets, found.logp, found.lse, found.entropy, found.mean, found.top, found.log_sum,
            n_rows, splits, V, 1.0 / temperature, LOG2_E / temperature, ignored, BLOCK=TOKENS, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return found


def gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, found: Statistics, coefficients: tuple[Tensor | None, ...],
    temperature: float, ignored: int, plan: LinearPlan | None = None, wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden states and head, strip by strip of the vocabulary; ``wanted`` says which are needed."""
    V, d = weight.shape
    rows, n_rows = rows_of(hidden), targets.numel()
    d_hidden = launching.empty(hidden.shape, hidden.dtype, hidden.device) if wanted[0] else None
    d_weight = launching.empty(weight.shape, weight.dtype, weight.device) if wanted[1] else None
    if n_rows == 0:
        return d_hidden, None if d_weight is None else d_weight.zero_()
    plan = plan or plan_for(hidden, weight)
    tile, product, width = plan.gradient, plan.product, plan.chunk
    dz = launching.empty((n_rows, width), hidden.dtype, hidden.device)
    several = width < V
    carry = d_hidden if hidden.dtype == torch.float32 else None
    if d_hidden is not None and several and carry is None:
        carry = launching.empty((n_rows, d), torch.float32, hidden.device)
    a, b, c, d_mean = coefficients
    with on(hidden):
        for first in range(0, V, width):
            code._linear_gradient_kernel[(triton.cdiv(n_rows, tile.block_m) * (width // tile.block_n),)](
                rows, weight, targets, found.top, found.log_sum, None if b is None else found.entropy,
                a, b, c, d_mean, dz, n_rows, V, d, first, width, *rows.stride(), *weight.stride(),
                1.0 / temperature, LOG2_E / temperature, ignored, EVEN=d % tile.block_k == 0, **_sizes(tile),
            )  # fmt: skip
            strip = weight[first : first + width]
            if d_weight is not None:
                _multiply(dz.T[: len(strip)], rows, None, d_weight[first : first + width], product, targets, ignored)
            if d_hidden is not None:
                last = first + width >= V
                _multiply(
                    dz[:, : len(strip)], strip, carry, d_hidden if last else None, product, None, ignored, first > 0
                )
    return d_hidden, d_weight


def _multiply(
    a: Tensor, b: Tensor, carry: Tensor | None, out: Tensor | None, tile: LinearTile, kept: Tensor | None,
    ignored: int, carried: bool = False,
) -> None:  # fmt: skip
    (m, k), n = a.shape, b.shape[1]
    code._product_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
        a, b, kept, carry, out, m, n, k, *a.stride(), *b.stride(), ignored, CARRIED=carried, **_sizes(tile)
    )
