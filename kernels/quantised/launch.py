"""Launching products with quantised weights on tensors that `op.py` has checked."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels import launching
from kernels.launching import FUSED_MULTIPLY_ADD, on, rows_of
from kernels.quantised import kernel as device_code
from kernels.quantised.config import Tile
from kernels.quantised.config import tile as tile_for
from minillm.functional.nf4 import META_BLOCK, nf4_levels

kernel: Any = device_code  # what triton.jit returns, no type checker follows
FORMATS = {"int8": kernel.INT8.value, "nf4": kernel.NF4.value, "nf4_double": kernel.NF4_DOUBLE.value}


class Weight(NamedTuple):
    """W (n, k) as it is stored. meta (and mean) belong to scales that are quantised too; None otherwise."""

    kind: str
    codes: Tensor  # (n, k) int8, or (ceil(n k / 2),) uint8
    scale: Tensor  # (n, 1) or (blocks,) fp32, or int8
    meta: Tensor | None
    mean: float
    n: int
    k: int
    block: int = 64

    def whole(self, block_k: int) -> bool:
        """Whether a tile's row of block_k weights has one scale and its bytes to itself."""
        return self.k % self.block == 0 and self.block % block_k == 0


@functools.cache
def levels(device: torch.device) -> Tensor:
    """The sixteen levels of NF4 on a device. Shapes: -> (16,) fp32"""
    return torch.from_numpy(nf4_levels().copy()).to(device)


def product(a: Tensor, weight: Weight, backward: bool = False, tile: Tile | None = None) -> Tensor:
    """a W^T, or backward a W. Shapes: a (..., k) -> (..., n), backward a (..., n) -> (..., k)"""
    width = weight.k if backward else weight.n
    out = launching.empty((*a.shape[:-1], width), a.dtype, a.device)
    if out.numel() == 0:
        return out
    if a.shape[-1] == 0:
        return out.zero_()
    rows = rows_of(a)
    size = tile or tile_for(len(rows), a.element_size())
    block_k = size.out if backward else size.reduced
    grid = (triton.cdiv(len(rows), size.rows) * triton.cdiv(width, size.out),)
    with on(a):
        kernel._product_kernel[grid](
            rows, weight.codes, weight.scale, weight.scale if weight.meta is None else weight.meta, levels(a.device), out,
            float(weight.mean), len(rows), weight.n, weight.k, *rows.stride(), FORMAT=FORMATS[weight.kind],
            BLOCK=weight.block, META_BLOCK=META_BLOCK, WHOLE=weight.whole(block_k), BACKWARD=backward,
            BLOCK_ROWS=size.rows, BLOCK_OUT=size.out, BLOCK_REDUCED=size.reduced, num_warps=size.warps,
            num_stages=size.stages, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return out
