"""What is compiled ahead of time for the losses: every kernel at its shipped sizes, and what must come out."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from kernels.aot import Argument, Build, Compiled, constant, integer, pointer, real
from kernels.token_loss import kernel_linear, kernel_rows, kernel_softmax, kernel_terms, traffic
from kernels.token_loss.config import TOKENS, LinearTile, RowTile, lane_elements, linear_plan, loss_tile, row_tile

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
ABSENT = constant(None)
UNIT = constant(1)  # the launcher turns a stride of 1 into a constant, and so do we
VOCABULARIES = (16, 1024, 16_384, 32_768, 128_256)
COLUMN, IDS, FLAGS = pointer("fp32"), pointer("i64"), pointer("i8")
MULTIPROCESSORS = 132
GROUPS = (("sm_90",), ("sm_80", "gfx942"), ("sm_100",))  # that get the same tiles


def builds(thorough: bool = False) -> list[Build]:
    """Every kernel in both widths at the sizes where the tile changes, and specialisations for awkward tensors."""
    lengths = sorted({*VOCABULARIES, *((64, 256, 2048, 4096, 8192) if thorough else ())})
    found = []
    for dtype in ("bf16", "fp32"):
        for V in lengths:
            found += [statistics(dtype, V), gradient(dtype, V), loss(dtype, V, policy=True)]
        found += [loss(dtype, V, policy=False) for V in (1024, 128_256)]
        found += [softmax(dtype, V, log) for V in (1024, 128_256) for log in (False, True)]
        found += [softmax_backward(dtype, V, log) for V in (1024, 128_256) for log in (False, True)]
        found += [build for targets in GROUPS for build in linear(dtype, 4096, targets)]
    found += [build for targets in GROUPS for build in linear("bf16", 4100, targets)]
    found += [statistics("bf16", 50_257, aligned=False), gradient("bf16", 50_257, aligned=False),
              loss("bf16", 50_257, policy=True, aligned=False), loss("bf16", 128_256, policy=True, wide=True)]  # fmt: skip
    return [*found, *terms(), scale("bf16"), scale("fp32")]


def _name(dtype: str, V: int, aligned: bool = True, wide: bool = False) -> str:
    return f"{dtype} V={V}" + ("" if aligned else " unaligned") + (" int64 strides" if wide else "")


def _sizes(V: int, aligned: bool, wide: bool, *names: str) -> dict[str, Argument]:
    """Row counts, the vocabulary and the strides of contiguous rows."""
    found = {"n_rows": integer(False), "V": integer(aligned)}
    for name in names:
        found |= {f"stride_{name}row": integer(aligned, wide), f"stride_{name}col": UNIT}
    return found


def _tile(tile: RowTile, dtype: str = "", aligned: bool = True) -> dict[str, Argument]:
    lane = {"LANE": constant(lane_elements(ITEMSIZE[dtype])), "PACKED": constant(aligned)} if dtype else {}
    return {
        "BLOCK_ROWS": constant(tile.block_rows),
        "BLOCK_V": constant(tile.block_v),
        "STAGES": constant(tile.stages),
        **lane,
    }


NUMBERS = {"inverse_temperature": real(), "scale": real(), "ignored": integer(False)}


def exponentials(tile: RowTile, itemsize: int) -> Callable[[Compiled, str], list[str]]:
    """On NVIDIA: one exponential an element and one a lane in the loop, and one a lane when lanes are merged."""

    def expect(compiled: Compiled, target: str) -> list[str]:
        elements = tile.block_rows * tile.block_v // compiled.threads
        found, wanted = compiled.instructions["MUFU.EX2"], elements + 2 * max(elements // lane_elements(itemsize), 1)
        wrong = not target.startswith("gfx") and found != wanted
        return [f"takes {found} exponentials a thread, the formula says {wanted}"] if wrong else []

    return expect


def statistics(dtype: str, V: int, aligned: bool = True, wide: bool = False) -> Build:
    """Statistics with the entropy."""
    tile, size = row_tile(V, ITEMSIZE[dtype]), ITEMSIZE[dtype]
    arguments = {
        "X": pointer(dtype, aligned), "TARGET": IDS, "LOGP": COLUMN, "LSE": COLUMN, "ENTROPY": COLUMN, "MEAN": ABSENT,
        "TOP": COLUMN, "LOG_SUM": COLUMN, **_sizes(V, aligned, wide, ""), **NUMBERS, **_tile(tile, dtype, aligned),
    }  # fmt: skip
    expected = traffic.issued_statistics(tile, size)
    return Build(kernel_rows._statistics_kernel, _name(dtype, V, aligned, wide), arguments, tile.warps, expected, aligned,
                 expect=exponentials(tile, size) if V > 16 else None)  # fmt: skip


def gradient(dtype: str, V: int, aligned: bool = True, wide: bool = False) -> Build:
    """The gradient from derivatives by log-prob and entropy."""
    tile, size = row_tile(V, ITEMSIZE[dtype]), ITEMSIZE[dtype]
    data = pointer(dtype, aligned)
    arguments = {
        "X": data, "TARGET": IDS, "TOP": COLUMN, "LOG_SUM": COLUMN, "ENTROPY": COLUMN, "A": COLUMN, "B": COLUMN,
        "C": ABSENT, "D": ABSENT, "DX": data, **_sizes(V, aligned, wide, "", "dx_"), **NUMBERS, **_tile(tile),
    }  # fmt: skip
    expected = traffic.issued_gradient(tile, size)
    return Build(kernel_rows._gradient_kernel, _name(dtype, V, aligned, wide), arguments, tile.warps, expected, aligned)


def loss(dtype: str, V: int, *, policy: bool, aligned: bool = True, wide: bool = False) -> Build:
    """Loss and gradient in one launch: the policy loss with everything, or plain cross-entropy."""
    tile, size = loss_tile(V, ITEMSIZE[dtype]), ITEMSIZE[dtype]
    data, whole = pointer(dtype, aligned), tile.covers(V)
    given = COLUMN if policy else ABSENT
    arguments = {
        "X": data, "TARGET": IDS, "WEIGHT": COLUMN, "OLD": given, "REF": given, "ADVANTAGE": given, "IMPORTANCE": given,
        "DX": data, "VALUE": COLUMN, "LOGP": COLUMN, "LSE": COLUMN, "ENTROPY": given, "RATIO": given,
        "FLAG": FLAGS if policy else ABSENT, "K1": given, "K2": given, "K3": given,
        **_sizes(V, aligned, wide, "", "dx_"), **NUMBERS,
        **{name: real() for name in ("smoothing", "z_loss", "low", "high", "dual", "beta", "entropy_coef")},
        "POLICY": constant(policy), "SMOOTH": constant(False), "KL": constant(3), "KL_RATIO": constant(False),
        "BONUS": constant(policy), "WHOLE": constant(whole), **_tile(tile, dtype, aligned),
    }  # fmt: skip
    name = f"{'policy' if policy else 'likelihood'} {_name(dtype, V, aligned, wide)}"
    expected = traffic.issued_loss(tile, size, whole=whole)
    return Build(kernel_rows._loss_kernel, name, arguments, tile.warps, expected, aligned)


def softmax(dtype: str, V: int, log: bool) -> Build:
    """softmax or its logarithm."""
    tile, data = row_tile(V, ITEMSIZE[dtype]), pointer(dtype)
    arguments = {
        "X": data, "Y": data, "TOP": COLUMN, "LOG_SUM": COLUMN, **_sizes(V, True, False, ""), "scale": real(),
        "LOG": constant(log), **_tile(tile, dtype),
    }  # fmt: skip
    expected = traffic.issued_softmax(tile, ITEMSIZE[dtype])
    return Build(kernel_softmax._softmax_kernel, f"{'log ' * log}{_name(dtype, V)}", arguments, tile.warps, expected)


def softmax_backward(dtype: str, V: int, log: bool) -> Build:
    """Its backward."""
    tile, data = row_tile(V, ITEMSIZE[dtype]), pointer(dtype)
    arguments = {
        "DY": data, "X": data, "TOP": COLUMN, "LOG_SUM": COLUMN, "DX": data, **_sizes(V, True, False, "", "x_"),
        "scale": real(), "LOG": constant(log), **_tile(tile),
    }  # fmt: skip
    return Build(kernel_softmax._softmax_backward_kernel, f"{'log ' * log}{_name(dtype, V)}", arguments, tile.warps)


def scale(dtype: str) -> Build:
    """The multiplication of a finished gradient."""
    arguments = {"X": pointer(dtype), "FACTOR": COLUMN, **_sizes(1, True, False, ""), "BLOCK_V": constant(8192)}
    return Build(kernel_rows._scale_kernel, dtype, arguments, 4)


def terms() -> list[Build]:
    """The kernels of the terms: token ratios with everything, smoothed likelihood, ratios of responses."""
    numbers = {name: real() for name in ("low", "high", "dual", "beta", "entropy_coef")}
    columns = {name: COLUMN for name in ("WEIGHT", "OLD", "REF", "ADVANTAGE", "IMPORTANCE", "VALUE", "A", "B")}
    watched = {"RATIO": COLUMN, "FLAG": FLAGS, "K1": COLUMN, "K2": COLUMN, "K3": COLUMN}
    found = []
    for policy in (True, False):
        given, absent = (COLUMN, ABSENT) if policy else (ABSENT, COLUMN)
        arguments = {
            "LOGP": COLUMN, "LSE": COLUMN, "ENTROPY": given, "MEAN": absent, "TARGET": IDS, "WEIGHT": COLUMN, "OLD": given,
            "REF": given, "ADVANTAGE": given, "IMPORTANCE": given, "VALUE": COLUMN, "A": COLUMN, "B": given,
            "C": absent, "D": absent, **(watched if policy else {name: ABSENT for name in watched}),
            "n_rows": integer(False), "ignored": integer(False), "smoothing": real(), "z_loss": real(), **numbers,
            "POLICY": constant(policy), "KL": constant(3), "KL_RATIO": constant(True), "BLOCK": constant(TOKENS),
        }  # fmt: skip
        name = "policy" if policy else "likelihood"
        found.append(Build(kernel_terms._token_terms_kernel, name, arguments, 4))
    for mean in (False, True):
        arguments = {
            "LOGP": COLUMN, "ENTROPY": COLUMN, "TARGET": IDS, **columns, **watched, "T": integer(False),
            "ignored": integer(False), **numbers, "KL": constant(3), "KL_RATIO": constant(True),
            "PER_LENGTH": constant(mean), "BLOCK": constant(TOKENS),
        }  # fmt: skip
        found.append(Build(kernel_terms._sequence_terms_kernel, "mean" if mean else "sum", arguments, 4))
    return found


# ---- from hidden states


def _linear_tile(tile: LinearTile) -> dict[str, Argument]:
    return {
        "BLOCK_M": constant(tile.block_m), "BLOCK_N": constant(tile.block_n), "BLOCK_K": constant(tile.block_k),
    }  # fmt: skip


def tensor_cores(compiled: Compiled, target: str) -> list[str]:
    """16-bit products run on the tensor cores of every target."""
    return [] if compiled.tensor_core else ["has no tensor-core instruction"]


def linear(dtype: str, d: int, targets: Sequence[str]) -> list[Build]:
    """Statistics, merge, gradient of a strip and the two products, as configured for some targets."""
    plan = linear_plan(8192, d, 128_256, ITEMSIZE[dtype], MULTIPROCESSORS, targets[0])
    data, expect = pointer(dtype), tensor_cores if dtype != "fp32" else None
    even = d % plan.forward.block_k == 0
    rows = {
        "stride_x_row": integer(d % 16 == 0),
        "stride_x_col": UNIT,
        "stride_w_row": integer(d % 16 == 0),
        "stride_w_col": UNIT,
    }
    name = f"{dtype} d={d}"
    group = {"EVEN": constant(even), "GROUP": constant(plan.forward.group)}
    parts = {f"PART_{n}": COLUMN for n in ("TOP", "SUM", "WEIGHTED")} | {"PART_MEAN": ABSENT, "PART_CHOSEN": COLUMN}
    statistics_ = {
        "X": data, "W": data, "TARGET": IDS, **parts, "n_rows": integer(False), "V": integer(True), "d": integer(d % 16 == 0),
        "splits": integer(False), "tiles_each": integer(False), **rows, "scale": real(), "ignored": integer(False),
        **_linear_tile(plan.forward), **group,
    }  # fmt: skip
    merge = {
        **parts, "TARGET": IDS, "LOGP": COLUMN, "LSE": COLUMN, "ENTROPY": COLUMN, "MEAN": ABSENT, "TOP": COLUMN,
        "LOG_SUM": COLUMN, "n_rows": integer(False), "splits": integer(False), "V": integer(True), **NUMBERS,
        "BLOCK": constant(TOKENS),
    }  # fmt: skip
    gradient_ = {
        "X": data, "W": data, "TARGET": IDS, "TOP": COLUMN, "LOG_SUM": COLUMN, "ENTROPY": COLUMN, "A": COLUMN, "B": COLUMN,
        "C": ABSENT, "D": ABSENT, "DZ": data, "n_rows": integer(False), "V": integer(True), "d": integer(d % 16 == 0),
        "first": integer(False), "width": integer(True), **rows, **NUMBERS, **_linear_tile(plan.gradient),
        "EVEN": constant(even), "GROUP": constant(plan.gradient.group),
    }  # fmt: skip
    found = [
        Build(kernel_linear._linear_statistics_kernel, name, statistics_, plan.forward.warps, None, True, plan.forward.stages, expect=expect),
        Build(kernel_linear._linear_gradient_kernel, name, gradient_, plan.gradient.warps, None, True, plan.gradient.stages, expect=expect),
    ]  # fmt: skip
    if d % 16 == 0:
        found.append(Build(kernel_linear._merge_kernel, name, merge, 4))
        found += [_product(dtype, d, plan.product, of_weight, expect) for of_weight in (True, False)]
    return [replace(build, targets=targets) for build in found]


def _product(dtype: str, d: int, tile: LinearTile, of_weight: bool, expect) -> Build:
    data = pointer(dtype)
    strides = (
        {"stride_am": UNIT, "stride_ak": integer(True)}
        if of_weight
        else {"stride_am": integer(True), "stride_ak": UNIT}
    )
    arguments = {
        "A": data, "B": data, "KEPT": IDS if of_weight else ABSENT, "CARRY": ABSENT if of_weight else COLUMN,
        "OUT": data if of_weight else ABSENT, "M": integer(False), "N": integer(True), "K": integer(False), **strides,
        "stride_bk": integer(True), "stride_bn": UNIT, "ignored": integer(False), "CARRIED": constant(not of_weight),
        **_linear_tile(tile), "GROUP": constant(tile.group),
    }  # fmt: skip
    name = f"{'head' if of_weight else 'hidden'} {dtype} d={d}"
    return Build(kernel_linear._product_kernel, name, arguments, tile.warps, None, True, tile.stages, expect=expect)
