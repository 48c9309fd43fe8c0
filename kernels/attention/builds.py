"""What is compiled ahead of time for attention: every kernel at its shipped tiles, and what must come out."""

from kernels.aot import Argument, Build, constant, integer, pointer, real
from kernels.attention import kernel_backward, kernel_forward, kernel_masks
from kernels.attention.config import Plan, Tile, padded, plan_for
from kernels.attention.launch import BOUNDS_BLOCK, DELTA_ROWS

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
ABSENT = constant(None)
UNIT = constant(1)  # the launcher turns a stride of 1 into a constant, and so do we
UNUSED = integer(aligned=True)  # 0: no window, the stride of an absent tensor
VARIANTS = ("full", "causal", "window", "padding", "prefix", "packed", "capped")


def _strides(names: str, aligned: bool = True, col: bool = True) -> dict[str, Argument]:
    """Strides (batch, head, row, and 1) of tensors."""
    found = {}
    for name in names.split():
        found |= {f"stride_{name}_{axis}": integer(aligned) for axis in ("batch", "head", "row")}
        if col:
            found[f"stride_{name}_col"] = UNIT
    return found


def _mask(variant: str, queries: bool) -> dict[str, Argument]:
    ends = ("LO", "HI") if queries else ("FIRST", "LAST")
    row = pointer("i32")
    return {
        "KEY_LENGTHS": row if variant == "padding" else ABSENT, "PREFIX": row if variant == "prefix" else ABSENT,
        **dict.fromkeys(ends, row if variant == "packed" else ABSENT),
    }  # fmt: skip


def _numbers(heads: str) -> dict[str, Argument]:
    return {n: integer(False) for n in (heads, "group", "L_q", "L_k", "offset", "window")} | {
        "scale": real(),
        "cap": real(),
    }


def _constants(variant: str, tile: Tile, d: int, d_v: int) -> dict[str, Argument]:
    values = {
        "D": d, "DV": d_v, "CAUSAL": variant in ("causal", "window", "prefix", "capped"), "WINDOWED": variant == "window",
        "CAPPED": variant == "capped", "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_D": padded(d), "BLOCK_DV": padded(d_v),
    }  # fmt: skip
    return {name: constant(value) for name, value in values.items()}


def _config(variant: str, dtype: str, d: int, d_v: int, tile: Tile) -> str:
    return f"{variant} {dtype} {d}/{d_v} {tile.block_m}x{tile.block_n}"


def _build(function, variant: str, dtype: str, d: int, d_v: int, tile: Tile, arguments: dict, target: str) -> Build:
    return Build(
        function, _config(variant, dtype, d, d_v, tile), arguments | _constants(variant, tile, d, d_v), tile.warps,
        None, stages=tile.stages, targets=(target,),
    )  # fmt: skip


def forward(target: str, variant: str, dtype: str, d: int, d_v: int, tile: Tile) -> Build:
    """The forward for contiguous heads."""
    data = pointer(dtype)
    arguments = {
        **dict.fromkeys(("Q", "K", "V", "OUT"), data), "LSE": pointer("fp32"), **_mask(variant, True), **_numbers("H"),
        **_strides("q k v"), **_strides("o", col=False),
    }  # fmt: skip
    return _build(kernel_forward._forward_kernel, variant, dtype, d, d_v, tile, arguments, target)


def backward_keys(target: str, variant: str, dtype: str, d: int, d_v: int, tile: Tile) -> Build:
    """The pass for dK and dV."""
    data = pointer(dtype)
    arguments = {
        **dict.fromkeys(("Q", "K", "V", "DO"), data), **dict.fromkeys(("LSE", "DELTA"), pointer("fp32")),
        **dict.fromkeys(("DK", "DV_OUT"), data), **_mask(variant, False), **_numbers("H_kv"),
        **_strides("q k v do"), **_strides("dk dv", col=False),
    }  # fmt: skip
    return _build(kernel_backward._backward_keys_kernel, variant, dtype, d, d_v, tile, arguments, target)


def backward_queries(target: str, variant: str, dtype: str, d: int, d_v: int, tile: Tile) -> Build:
    """The pass for dQ."""
    data = pointer(dtype)
    arguments = {
        **dict.fromkeys(("Q", "K", "V", "DO"), data), **dict.fromkeys(("LSE", "DELTA"), pointer("fp32")), "DQ": data,
        **_mask(variant, True), **_numbers("H"), **_strides("q k v do"), **_strides("dq", col=False),
    }  # fmt: skip
    return _build(kernel_backward._backward_queries_kernel, variant, dtype, d, d_v, tile, arguments, target)
