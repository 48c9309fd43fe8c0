"""What is compiled ahead of time for the gated units, and what must come out."""

from kernels.activations import kernel, traffic
from kernels.activations.config import tile
from kernels.aot import Argument, Build, constant, integer, pointer

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def builds(thorough: bool = False) -> list[Build]:
    """Both units, forward and backward, in two precisions, at a short and a wide row; and awkward tensors."""
    found = []
    for silu in (True, False):
        for dtype in ("bf16", "fp32", *(("fp16",) if thorough else ())):
            for d in (64, 256, 1024, 14_336) if thorough else (64, 14_336):
                found += [build(silu, dtype, d, backward) for backward in (False, True)]
        found += [build(silu, "bf16", 14_336, backward, aligned=False) for backward in (False, True)]
    return found + [build(True, "bf16", 14_336, backward, wide=True) for backward in (False, True)]


def build(silu: bool, dtype: str, d: int, backward: bool, aligned: bool = True, wide: bool = False) -> Build:
    """One of the two kernels for rows of d_ff = d."""
    size, data, row = tile(d, backward), pointer(dtype, aligned), integer(aligned, wide)
    unit = constant(1)
    shape: dict[str, Argument] = {"n_rows": integer(False), "d": integer(aligned)}
    operands: dict[str, Argument] = {
        "stride_v_row": row, "stride_v_col": unit, "stride_z_row": row, "stride_z_col": unit
    }  # fmt: skip
    sizes = {
        "SILU": constant(silu), "BLOCK_ROWS": constant(size.block_rows), "BLOCK_D": constant(size.block_d)
    }  # fmt: skip
    if backward:
        arguments = {
            "DY": data, "VALUE": data, "GATE": data, "DVALUE": data, "DGATE": data, **shape,
            "stride_dy_row": row, "stride_dy_col": unit, **operands, "stride_dv_row": row, "stride_dz_row": row, **sizes,
        }  # fmt: skip
    else:
        arguments = {"VALUE": data, "GATE": data, "Y": data, **shape, **operands, **sizes}
    config = f"{'swiglu' if silu else 'geglu'} {dtype} d={d}" + " unaligned" * (not aligned) + " int64 strides" * wide
    function = kernel._backward_kernel if backward else kernel._forward_kernel
    return Build(function, config, arguments, size.warps, traffic.issued(size, ITEMSIZE[dtype], backward), aligned)
