"""Launching the rotation on tensors that `op.py` has checked."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import triton
from torch import Tensor

from kernels import launching
from kernels.launching import FUSED_MULTIPLY_ADD, on
from kernels.rope import kernel as device_code
from kernels.rope.config import Tile
from kernels.rope.config import tile as tile_for

kernel: Any = device_code  # what triton.jit returns, no type checker follows


def _four_axes(x: Tensor) -> Tensor:
    """x as (batch, heads, L, d_head): a view of up to four axes, else as `reshape` does it."""
    if x.ndim > 4:
        return x.reshape(x.shape[0], -1, *x.shape[-2:])
    return x[(None,) * (4 - x.ndim)] if x.ndim < 3 else x[:, None] if x.ndim == 3 else x


def like(x: Tensor) -> Tensor:
    """A contiguous tensor of this shape, or one whose heads lie within positions where those of x do."""
    if x.ndim == 4 and x.stride(3) == 1 and x.stride(1) < x.stride(2) < x.stride(0):
        B, H, L, d = x.shape
        return launching.empty((B, L, H, d), x.dtype, x.device).transpose(1, 2)
    return launching.empty(x.shape, x.dtype, x.device)


def turn(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, start: int, pairing: str,
    backward: bool = False, out: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """x turned by the angles of its positions (back, with ``backward``), in a new tensor or in ``out``, which may be x.

    Shapes: x (..., L, d_head), cos and sin (n, d_head / 2), positions None, (L,) or (B, L) -> (..., L, d_head)
    """
    y = like(x) if out is None else out
    if x.numel() == 0:
        return y
    source, target = _four_axes(x), _four_axes(y)
    batch, heads, length, d = source.shape
    tile = tile or tile_for(d, pairing)
    rows = batch * heads * length
    if positions is not None:
        positions = positions.contiguous()
    with on(x):
        kernel._turn_kernel[(triton.cdiv(rows, tile.block_rows),)](
            source, cos, sin, positions, target, rows, heads, length, d // 2, start,
            *source.stride(), *target.stride(), cos.stride(0),
            length if positions is not None and positions.ndim == 2 else 0,
            INTERLEAVED=pairing == "interleaved", BACKWARD=backward, BLOCK_ROWS=tile.block_rows,
            BLOCK_HALF=tile.block_half, num_warps=tile.warps, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return y
