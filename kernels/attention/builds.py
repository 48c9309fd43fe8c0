"""What is compiled ahead of time for attention: every kernel at its shipped tiles, and what must come out."""

from collections.abc import Callable

from kernels.aot import Argument, Build, Compiled, constant, integer, pointer, real
from kernels.attention import kernel_backward, kernel_forward, kernel_masks
from kernels.attention.config import Tile, padded, plan_for
from kernels.attention.launch import BOUNDS_BLOCK, DELTA_ROWS

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
ABSENT = constant(None)
UNIT = constant(1)  # the launcher turns a stride of 1 into a constant, and so do we
UNUSED = integer(aligned=True)  # 0: no window, the stride of an absent tensor
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = ((64, 64), (128, 128), (256, 256))
ODD_WIDTHS = ((96, 96), (192, 128))
VARIANTS = ("full", "causal", "window", "padding", "prefix", "packed", "capped")


def builds(thorough: bool = False) -> list[Build]:
    """The causal kernels in bf16 (on Hopper at every class of widths, and in fp32), and the two small kernels.

    ``thorough`` takes all masks at one width, and all classes, odd widths and dtypes under one mask.
    """
    found = []
    for target in TARGETS:
        wanted = [("causal", "bf16", (128, 128))]
        if thorough:
            masks = VARIANTS if target == "sm_90" else ("causal", "packed", "capped")
            wanted = [(variant, "bf16", (128, 128)) for variant in masks]
            wanted += [("causal", "bf16", widths) for widths in (*WIDTHS, *ODD_WIDTHS) if widths != (128, 128)]
            wanted += [("causal", "fp32", widths) for widths in WIDTHS] + [("causal", "fp16", (128, 128))]
        elif target == "sm_90":
            wanted = [("causal", "bf16", widths) for widths in WIDTHS] + [("causal", "fp32", (128, 128))]
        for variant, dtype, widths in wanted:
            plan = plan_for(target, ITEMSIZE[dtype], *widths)
            found.append(forward(target, variant, dtype, *widths, plan.forward))
            found.append(backward_keys(target, variant, dtype, *widths, plan.keys))
            found.append(backward_queries(target, variant, dtype, *widths, plan.queries))
    for dtype in ("bf16", "fp32") if thorough else ("bf16",):
        found += [
            delta(dtype, width, seen) for width in ((64, 128, 256) if thorough else (128,)) for seen in (False, True)
        ]
    return found + [bounds(queries) for queries in (False, True)]


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


def products(target: str, tile: Tile, sizes: list[tuple[int, int, int]]) -> int | None:
    """How many tensor-core instructions a warp issues for products of these sizes (rows, columns, summands) of 16 bits.

    Ampere: 16 x 8 x 16 each, shared among the warps. Hopper: 64 rows a group of four warps, all columns, 16
    summands each, where the rows are enough for all groups. Otherwise None: no closed form.
    """
    if target == "sm_80" and all(
        m * n >= 16 * 16 * tile.warps for m, n, _ in sizes
    ):  # otherwise warps repeat each other
        return sum(m * n * k // (16 * 8 * 16 * tile.warps) for m, n, k in sizes)
    if target == "sm_90" and all(m % (16 * tile.warps) == 0 for m, _, _ in sizes):
        return sum(m // (16 * tile.warps) * k // 16 for m, _, k in sizes)
    return None


def _expect(dtype: str, tile: Tile, sizes: list[tuple[int, int, int]]) -> Callable[[Compiled, str], list[str]]:
    def expect(compiled: Compiled, target: str) -> list[str]:
        wanted = products(target, tile, sizes) if dtype != "fp32" else None
        if wanted is None or compiled.tensor_core == wanted:
            return []
        return [f"has {compiled.tensor_core} tensor-core instructions, {wanted} follow from the tile's sizes"]

    return expect


def _build(
    function, variant: str, dtype: str, d: int, d_v: int, tile: Tile, arguments: dict, target: str,
    sizes: list[tuple[int, int, int]],
) -> Build:  # fmt: skip
    return Build(
        function, _config(variant, dtype, d, d_v, tile), arguments | _constants(variant, tile, d, d_v), tile.warps,
        None, stages=tile.stages, targets=(target,), expect=_expect(dtype, tile, sizes),
    )  # fmt: skip


def forward(target: str, variant: str, dtype: str, d: int, d_v: int, tile: Tile) -> Build:
    """The forward for contiguous heads."""
    data = pointer(dtype)
    arguments = {
        **dict.fromkeys(("Q", "K", "V", "OUT"), data), "LSE": pointer("fp32"), **_mask(variant, True), **_numbers("H"),
        **_strides("q k v"), **_strides("o", col=False),
    }  # fmt: skip
    m, n, sizes = tile.block_m, tile.block_n, (padded(d), padded(d_v))
    of = [(m, n, sizes[0]), (m, sizes[1], n)]
    return _build(kernel_forward._forward_kernel, variant, dtype, d, d_v, tile, arguments, target, of)


def backward_keys(target: str, variant: str, dtype: str, d: int, d_v: int, tile: Tile) -> Build:
    """The pass for dK and dV."""
    data = pointer(dtype)
    arguments = {
        **dict.fromkeys(("Q", "K", "V", "DO"), data), **dict.fromkeys(("LSE", "DELTA"), pointer("fp32")),
        **dict.fromkeys(("DK", "DV_OUT"), data), **_mask(variant, False), **_numbers("H_kv"),
        **_strides("q k v do"), **_strides("dk dv", col=False),
    }  # fmt: skip
    m, n, sizes = tile.block_m, tile.block_n, (padded(d), padded(d_v))
    of = [(n, m, sizes[0]), (n, m, sizes[1]), (n, sizes[1], m), (n, sizes[0], m)]
    return _build(kernel_backward._backward_keys_kernel, variant, dtype, d, d_v, tile, arguments, target, of)


def backward_queries(target: str, variant: str, dtype: str, d: int, d_v: int, tile: Tile) -> Build:
    """The pass for dQ."""
    data = pointer(dtype)
    arguments = {
        **dict.fromkeys(("Q", "K", "V", "DO"), data), **dict.fromkeys(("LSE", "DELTA"), pointer("fp32")), "DQ": data,
        **_mask(variant, True), **_numbers("H"), **_strides("q k v do"), **_strides("dq", col=False),
    }  # fmt: skip
    m, n, sizes = tile.block_m, tile.block_n, (padded(d), padded(d_v))
    of = [(m, n, sizes[0]), (m, n, sizes[1]), (m, sizes[0], n)]
    return _build(kernel_backward._backward_queries_kernel, variant, dtype, d, d_v, tile, arguments, target, of)


def delta(dtype: str, d_v: int, arriving: bool) -> Build:
    """The number a query that the backward begins with; ``arriving``: something arrives at the log-sum-exps."""
    arguments = {
        "OUT": pointer(dtype), "DO": pointer(dtype), "DLSE": pointer("fp32") if arriving else ABSENT, "DELTA": pointer("fp32"),
        **{name: integer(False) for name in ("n_rows", "H", "L_q")}, **_strides("o", col=False), **_strides("do"),
        **{name: UNUSED for name in _strides("dlse", col=False)},
        "DV": constant(d_v), "BLOCK_M": constant(DELTA_ROWS), "BLOCK_DV": constant(padded(d_v)),
    }  # fmt: skip
    config = f"{dtype} {d_v}{' with dlse' if arriving else ''}"
    return Build(kernel_backward._delta_kernel, config, arguments, 4)


def bounds(queries: bool) -> Build:
    """The intervals of packed documents."""
    row = pointer("i32")
    arguments = {
        **dict.fromkeys(("STARTS", "OTHER", "FROM", "TO"), row),
        **{name: integer(False) for name in ("n", "n_other", "n_documents", "window")},
        "CAUSAL": constant(True), "WINDOWED": constant(True), "BOTTOM_RIGHT": constant(True), "QUERIES": constant(queries),
        "STEPS": constant(10), "BLOCK": constant(BOUNDS_BLOCK),
    }  # fmt: skip
    return Build(kernel_masks._bounds_kernel, "queries" if queries else "keys", arguments, 4)
