"""What is compiled ahead of time for the experts: every kernel at its shipped sizes, and what must come out."""

from collections.abc import Callable

from kernels.aot import Argument, Build, Compiled, constant, integer, pointer
from kernels.experts import kernel_combine, kernel_packing, kernel_products, kernel_routing
from kernels.experts.config import (
    TARGETS,
    Tile,
    next_power_of_two,
    pack_tile,
    plan,
    route_tile,
    row_tile,
)  # fmt: skip
from kernels.experts.launch import GATES_AT_ONCE
from kernels.experts.launch_routing import TILES_AT_ONCE, padded, shares_at_once
from kernels.experts.traffic import products_a_step

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
ABSENT = constant(None)
UNIT = constant(1)
WIDTH = 2048
MANY, FEW = 262_144, 512  # assignments: tall tiles, or short ones
EXPERTS = 128


def builds(thorough: bool = False) -> list[Build]:
    """Router and packing at 128 experts, products in bf16 with tall and short tiles, and in fp32.

    ``thorough`` adds 8 and 512 experts, fp16, and fp32 on every target.
    """
    found = []
    for n_experts in (8, 128, 512) if thorough else (128,):
        found += routing("bf16", n_experts) + packing(n_experts)
    for target in TARGETS:
        found += products("bf16", MANY, target)
        found += [build for build in products("bf16", FEW, target) if build.kernel != "_weight_gradient_kernel"]
        if thorough:
            found += products("fp16", MANY, target)
        if thorough or target == "sm_90":
            found += products("fp32", MANY, target)
    return found + combining("bf16") + combining("fp32")


def routing(dtype: str, n_experts: int) -> list[Build]:
    """The router's kernels: softmax renormalised, and the sigmoid with a bias."""
    tile, k = route_tile(n_experts), 8
    wide = constant(padded(n_experts))
    found = []
    for scoring in ("softmax", "sigmoid"):
        flags = {"SIGMOID": constant(scoring == "sigmoid"), "RENORMALISE": constant(True)}
        biased = scoring == "sigmoid"
        config = f"{scoring} {dtype} E={n_experts}"
        single, number = pointer("fp32"), pointer("i32")
        sizes = {"BLOCK_T": constant(tile.block_t), "BLOCK_E": wide}
        head = {"n_tokens": integer(False), "n_experts": integer(True), "k": integer(False),
                "stride_row": integer(True), "stride_col": UNIT}  # fmt: skip
        forward = {
            "LOGITS": pointer(dtype), "BIAS": single if biased else ABSENT, "GATES": single, "EXPERTS": number,
            "SHARE_P": single, "SHARE_N": number, "SHARE_Z": single, **head,
            "stride_bias": UNIT if biased else integer(True), **flags, **sizes,
            "BLOCK_K": constant(next_power_of_two(k)),
        }  # fmt: skip
        backward = {
            "LOGITS": pointer(dtype), "EXPERTS": number, "LOADS": number, "DGATES": single, "DAUX": single, "DZ": single,
            "DLOGITS": pointer(dtype), **head, "stride_dgates_row": integer(False), "stride_dgates_col": UNIT,
            **flags, **sizes,
        }  # fmt: skip
        found.append(Build(kernel_routing._route_kernel, config, forward, tile.warps))
        found.append(Build(kernel_routing._route_backward_kernel, config, backward, tile.warps))
    balance = {
        "SHARE_P": single, "SHARE_N": number, "SHARE_Z": single, "LOADS": number, "AUX": single, "Z": single,
        "n_tokens": integer(False), "n_experts": integer(True), "k": integer(False), "n_shares": integer(False),
        "BLOCK_S": constant(shares_at_once(n_experts)), "BLOCK_E": wide,
    }  # fmt: skip
    return [*found, Build(kernel_routing._balance_kernel, f"E={n_experts}", balance, 8)]


def packing(n_experts: int) -> list[Build]:
    """The kernels of the counting sort, without and with a capacity, and the list of tiles."""
    tile, number = pack_tile(MANY, n_experts), pointer("i32")
    wide = {"BLOCK_E": constant(padded(n_experts))}
    count: dict[str, Argument] = {
        "n_assignments": integer(False),
        "n_experts": integer(True),
        "k": integer(False),
        "chunk": integer(True),
    }
    strides = {"stride_row": integer(False), "stride_col": UNIT}
    sizes = {"BLOCK_A": constant(tile.block_a), **wide}
    config = f"E={n_experts}"
    found = [
        Build(kernel_packing._count_kernel, config,
              {"EXPERTS": number, "COUNTS": number, "ORDER": number, **count, **strides, **sizes}, tile.warps),
        Build(kernel_packing._tiles_kernel, config,
              {"OFFSETS": number, "TILES": number, "n_rows": integer(False), "n_experts": integer(True), "n_tiles": integer(False),
               "BLOCK_M": constant(128), "BLOCK_T": constant(TILES_AT_ONCE), **wide}, 4),
    ]  # fmt: skip
    for limited in (False, True):
        config = f"E={n_experts}" + (" capacity" if limited else "")
        flag = {"LIMITED": constant(limited)}
        scan = {"COUNTS": number, "OFFSETS": number, "n_chunks": integer(False), "n_experts": integer(True),
                "capacity": integer(False), **flag, "BLOCK_C": constant(tile.block_c), **wide}  # fmt: skip
        place = {"EXPERTS": number, "COUNTS": number, "OFFSETS": number, "ORDER": number, "PLACES": number,
                 **count, "capacity": integer(False), **strides, **flag, **sizes}  # fmt: skip
        found.append(Build(kernel_packing._scan_kernel, config, scan, tile.warps))
        found.append(Build(kernel_packing._place_kernel, config, place, tile.warps))
    return found


def _counted(tile: Tile, factors: int, itemsize: int) -> Callable[[Compiled, str], list[str]] | None:
    """Tensor-core instructions of one step of the loop as a closed form of the tile; the loop may be unrolled."""
    if itemsize == 4:
        return None

    def expect(compiled: Compiled, target: str) -> list[str]:
        each = products_a_step(tile, target) * factors
        if compiled.tensor_core and compiled.tensor_core % each == 0:
            return []
        return [f"has {compiled.tensor_core} tensor-core instructions, not a multiple of the {each} of a step"]

    return expect


def products(dtype: str, n_rows: int, target: str) -> list[Build]:
    """The four products with the tiles of one architecture."""
    size = ITEMSIZE[dtype]
    chosen = plan(n_rows, EXPERTS, size, target)
    data, number = pointer(dtype), pointer("i32")
    rows, even, odd = integer(True), integer(True), integer(False)
    found = []

    def build(function, name: str, arguments: dict[str, Argument], tile: Tile, factors: int = 1, group: bool = True):
        sizes = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        sizes |= {"GROUP": tile.group} if group else {}
        config = f"{name}{dtype} {tile.block_m}x{tile.block_n}x{tile.block_k}"
        found.append(Build(
            function, config, arguments | {n: constant(v) for n, v in sizes.items()}, tile.warps, None,
            stages=tile.stages, targets=(target,), expect=_counted(tile, factors, size),
        ))  # fmt: skip

    left = {"stride_x_row": rows, "stride_x_col": UNIT}
    for name, gather, inner in (("down ", False, False), ("dx ", False, True), ("u ", True, True)):
        build(kernel_products._grouped_kernel, name, {
            "X": data, "ORDER": number if gather else ABSENT, "W": data, "TILES": number, "Y": data,
            "n_tiles": odd, "n_cols": even, "n_inner": even, "top_k": odd if gather else UNIT, **left, "stride_w_expert": even,
            "stride_w_inner": even if inner else UNIT, "stride_w_col": UNIT if inner else even, "GATHER": constant(gather),
        }, chosen.down)  # fmt: skip
    for name, keep in (("", False), ("keeping h ", True)):
        build(kernel_products._up_kernel, name, {
            "X": data, "ORDER": number, "W": data, "TILES": number, "H": data if keep else ABSENT, "A": data,
            "n_tiles": odd, "d_ff": even, "n_inner": even, "top_k": odd, **left, "stride_w_expert": even,
            "stride_w_inner": UNIT, "stride_w_col": even,
        }, chosen.up, factors=2)  # fmt: skip
    for name, gather_p in (("dw_down ", True), ("dw_in ", False)):
        build(kernel_products._weight_gradient_kernel, name, {
            "P": data, "Q": data, "ORDER": number, "OFFSETS": number, "DW": data, "n_out": even, "n_in": even, "top_k": odd,
            "stride_p_row": rows, "stride_p_col": UNIT, "stride_q_row": rows, "stride_q_col": UNIT,
            "GATHER_P": constant(gather_p), "GATHER_Q": constant(not gather_p),
        }, chosen.weights, group=False)  # fmt: skip
    return found


def combining(dtype: str) -> list[Build]:
    """The combination with and without gates, and the sum of the gates' gradients."""
    tile, data, number = row_tile(WIDTH), pointer(dtype), pointer("i32")
    found = []
    for gated in (True, False):
        arguments = {
            "Y": data, "PLACES": number, "GATES": pointer("fp32") if gated else ABSENT, "Z": data,
            "n_tokens": integer(False), "d": integer(True), "top_k": integer(False),
            "stride_gates_row": integer(not gated), "stride_gates_col": UNIT if gated else integer(True),
            "BLOCK_T": constant(tile.block_t), "BLOCK_D": constant(tile.block_d),
        }  # fmt: skip
        elements = tile.block_t * tile.block_d
        size = elements * ITEMSIZE[dtype]
        found.append(
            Build(
                kernel_combine._combine_kernel,
                f"{dtype} d={WIDTH}" + (" gates" if gated else ""),
                arguments,
                tile.warps,
                (size, size),
            )
        )
    size = ITEMSIZE[dtype]
    back = {"U": data, "ORDER": number, "H": data, "GATES": pointer("fp32"), "DH": data, "GA": data, "DG": pointer("fp32"),
            "n_rows": integer(False), "d_ff": integer(True), "top_k": integer(False), "stride_gates_row": integer(False),
            "stride_gates_col": UNIT, "BLOCK_R": constant(tile.block_t), "BLOCK_D": constant(tile.block_d)}  # fmt: skip
    found.append(
        Build(
            kernel_products._activation_backward_kernel,
            f"{dtype} d={WIDTH}",
            back,
            tile.warps,
            (3 * elements * size, 3 * elements * size),
        )
    )
    arguments = {"DG": pointer("fp32"), "PLACES": number, "DGATES": pointer("fp32"), "n_assignments": integer(False), "BLOCK_A": constant(GATES_AT_ONCE)}  # fmt: skip
    if dtype == "fp32":
        found.append(Build(kernel_combine._gate_gradient_kernel, "", arguments, 4))
    return found
