"""Launching the gated units on tensors that `op.py` has checked."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import triton
from torch import Tensor

from kernels import launching
from kernels.activations import kernel as device_code
from kernels.activations.config import Tile
from kernels.activations.config import tile as tile_for
from kernels.launching import FUSED_MULTIPLY_ADD, on, rows_of

kernel: Any = device_code  # what triton.jit returns, no type checker follows


def halves(h: Tensor) -> tuple[Tensor, Tensor]:
    """The value half and the gate half of a joint projection, as views."""
    half = h.shape[-1] // 2
    return h[..., :half], h[..., half:]


def _options(tile: Tile, n_rows: int, d: int) -> tuple[Any, dict[str, Any]]:
    grid = (triton.cdiv(n_rows, tile.block_rows) * triton.cdiv(d, tile.block_d),)
    return grid, {"BLOCK_ROWS": tile.block_rows, "BLOCK_D": tile.block_d, "num_warps": tile.warps, **FUSED_MULTIPLY_ADD}


def forward(value: Tensor, gate: Tensor, silu: bool, tile: Tile | None = None) -> Tensor:
    """y. Shapes: value, gate (..., d_ff) -> (..., d_ff)."""
    y = launching.empty(value.shape, value.dtype, value.device)
    if y.numel() == 0:
        return y
    v, z, d = rows_of(value), rows_of(gate), value.shape[-1]
    grid, options = _options(tile or tile_for(d), len(v), d)
    with on(value):
        kernel._forward_kernel[grid](v, z, y, len(v), d, *v.stride(), *z.stride(), SILU=silu, **options)
    return y


def backward(
    dy: Tensor, value: Tensor, gate: Tensor, into: tuple[Tensor, Tensor], silu: bool, tile: Tile | None = None
) -> None:
    """Write the gradients of value and gate to ``into``, which have rows of contiguous columns and may be value and gate.

    Shapes: dy, value, gate and both of into (..., d_ff)
    """
    if dy.numel() == 0:
        return
    dy, v, z, d = rows_of(dy), rows_of(value), rows_of(gate), value.shape[-1]
    dv, dz = (t.view(-1, d) if t.is_contiguous() else t.flatten(0, -2) for t in into)
    grid, options = _options(tile or tile_for(d, backward=True), len(v), d)
    with on(value):
        kernel._backward_kernel[grid](
            dy, v, z, dv, dz, len(v), d, *dy.stride(), *v.stride(), *z.stride(), dv.stride(0), dz.stride(0),
            SILU=silu, **options,
        )  # fmt: skip
