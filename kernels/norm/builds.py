"""What is compiled ahead of time for the norms: every kernel at its shipped sizes, and what must come out."""

from kernels.aot import Argument, Build, constant, integer, pointer, real
from kernels.norm import kernel, traffic
from kernels.norm.config import BACKWARD_LIMIT, FORWARD_LIMIT, SUM_TILE, backward_plan, forward_tile

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
ABSENT = constant(None)
UNIT = constant(1)  # the launcher turns a stride of 1 into a constant, and so do we
UNUSED = integer(aligned=True)  # 0, the stride of an absent tensor
VARIANTS = {"rms": (False, False), "layer": (True, False), "add-rms": (False, True), "add-layer": (True, True)}
FORWARD_LENGTHS = (128, 4096, FORWARD_LIMIT, FORWARD_LIMIT + 16)  # short, long, longest in one tile, in several
BACKWARD_LENGTHS = (128, 4096, BACKWARD_LIMIT, BACKWARD_LIMIT + 16)
MULTIPROCESSORS = 132
THREADS = 32


def builds(thorough: bool = False) -> list[Build]:
    """Every variant at four row lengths in both widths, and the specialisations for awkward tensors.

    ``thorough`` takes every length at which the tile changes, so that every shipped configuration is compiled.
    """
    powers = [1 << k for k in range(4, FORWARD_LIMIT.bit_length())] if thorough else []
    found = []
    for variant in VARIANTS:
        for dtype in ("bf16", "fp32"):
            found += [forward(variant, dtype, d) for d in sorted({*FORWARD_LENGTHS, *powers})]
            lengths = sorted({*BACKWARD_LENGTHS, *(d for d in powers if d <= BACKWARD_LIMIT)})
            found += [build for d in lengths for build in backward(variant, dtype, d)]
        found += [forward(variant, "bf16", 4096, aligned=False), *backward(variant, "bf16", 4096, aligned=False)]
    found += [forward("add-layer", "bf16", 4096, wide=True), *backward("add-layer", "bf16", 4096, wide=True)]
    found += [sum_shares(shift, dtype) for shift in (False, True) for dtype in ("bf16", "fp32")]
    return found


def _matrix(name: str, aligned: bool, present: bool, wide: bool) -> dict[str, Argument]:
    row = integer(aligned, wide) if present else UNUSED
    return {f"stride_{name}_row": row, f"stride_{name}_col": UNIT if present else UNUSED}


def _config(variant: str, dtype: str, d: int, aligned: bool, wide: bool) -> str:
    return f"{variant} {dtype} d={d}" + ("" if aligned else " unaligned") + (" int64 strides" if wide else "")


def forward(variant: str, dtype: str, d: int, aligned: bool = True, wide: bool = False) -> Build:
    """The forward of a variant (layer variants with a shift) for contiguous rows of length d."""
    centred, residual = VARIANTS[variant]
    tile = forward_tile(d)
    data, weight, row = pointer(dtype, aligned), pointer(dtype, aligned), pointer("fp32", aligned)
    arguments = {
        "X": data, "R": data if residual else ABSENT, "G": weight, "B": weight if centred else ABSENT,
        "S": data if residual else ABSENT, "Y": data, "MEAN": row if centred else ABSENT, "RHO": row,
        "n_rows": integer(False), "d": integer(aligned),
        **_matrix("x", aligned, True, wide), **_matrix("r", aligned, residual, wide),
        "stride_g": UNIT, "stride_b": UNIT if centred else UNUSED, "eps": real(), "CENTRED": constant(centred),
    }  # fmt: skip
    long = not tile.covers(d)
    if not long:
        arguments["BLOCK_ROWS"] = constant(tile.block_rows)
    arguments["BLOCK_D"] = constant(tile.block_d)
    size = ITEMSIZE[dtype]
    expected = traffic.issued_forward(
        tile, tile.warps * THREADS, size, size, residual=residual, shift=centred, long=long
    )
    function = kernel._forward_long_kernel if long else kernel._forward_kernel
    return Build(function, _config(variant, dtype, d, aligned, wide), arguments, tile.warps, expected, aligned)


def backward(variant: str, dtype: str, d: int, aligned: bool = True, wide: bool = False) -> list[Build]:
    """The backward of a variant: one kernel, or two where a row is longer than a tile."""
    centred, residual = VARIANTS[variant]
    size = ITEMSIZE[dtype]
    plan = backward_plan(1 << 20, d, size, MULTIPROCESSORS, centred=centred, residual=residual)
    data, row = pointer(dtype, aligned), pointer("fp32", aligned)
    rest: dict[str, Argument] = {
        "n_rows": integer(False), "d": integer(aligned),
        **_matrix("dy", aligned, True, wide), **_matrix("ds", aligned, residual, wide),
        **_matrix("x", aligned, True, wide), "stride_g": UNIT, "CENTRED": constant(centred),
    }  # fmt: skip
    results = {"DX": data, "PARTIAL_G": row, "PARTIAL_B": row if centred else ABSENT}
    head = {"DY": data, "DS": data if residual else ABSENT, "X": data, "G": data,
            "MEAN": row if centred else ABSENT, "RHO": row}  # fmt: skip
    sizes = {"BLOCK_D": constant(plan.tile.block_d), "STAGES": constant(plan.tile.stages)}
    config = _config(variant, dtype, d, aligned, wide)
    expected = traffic.issued_backward(
        plan.tile, plan.tile.warps * THREADS, size, size, residual=residual, shift=centred
    )
    if plan.means is None:
        arguments = {**head, **results, **rest, "BLOCK_ROWS": constant(plan.tile.block_rows), **sizes}
        return [Build(kernel._backward_kernel, config, arguments, plan.tile.warps, expected, aligned)]

    means = {"MEAN_GX": row, "MEAN_G": row if centred else ABSENT}
    first = {
        name: a for name, a in {**head, **means, **rest}.items() if name not in ("DS", "stride_ds_row", "stride_ds_col")
    }
    first["BLOCK_D"] = constant(plan.means.block_d)
    issued = traffic.issued_means(plan.means, plan.means.warps * THREADS, size, size)
    whole = {**head, **means, **results, **rest, **sizes}
    found = [Build(kernel._backward_long_kernel, config, whole, plan.tile.warps, expected, aligned)]
    if not residual:  # the residual variants use the same first kernel
        found.append(Build(kernel._backward_long_means_kernel, config, first, plan.means.warps, issued, aligned))
    return found


def sum_shares(shift: bool, dtype: str) -> Build:
    """The kernel that adds the programs' shares of the weights' gradients."""
    row, weight = pointer("fp32"), pointer(dtype)
    arguments = {
        "PARTIAL_G": row, "PARTIAL_B": row if shift else ABSENT, "DG": weight, "DB": weight if shift else ABSENT,
        "n_shares": integer(False), "d": integer(True),
        "BLOCK_SHARES": constant(SUM_TILE.block_rows), "BLOCK_COLS": constant(SUM_TILE.block_d),
    }  # fmt: skip
    config = f"{'with' if shift else 'without'} shift {dtype}"
    return Build(
        kernel._sum_shares_kernel, config, arguments, SUM_TILE.warps, traffic.issued_sum(SUM_TILE, shift=shift)
    )
