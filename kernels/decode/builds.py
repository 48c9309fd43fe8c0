"""What is compiled ahead of time for decoding: the shipped tiles at the widths in use, and what must come out."""

from kernels.aot import Argument, Build, Compiled, constant, integer, pointer, real
from kernels.decode import kernel, traffic
from kernels.decode.config import Plan, Widths, padded, plan_for, widths

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
MULTIPROCESSORS = 132
# name: heads of a group times new tokens, width of keys, width of values
SHAPES = {
    "multi-head": (1, 128, 128),
    "group of 8": (8, 128, 128),
    "group of 4, 64 wide": (4, 64, 64),
    "group of 8, 4 new": (32, 128, 128),
    "192 and 128 wide": (1, 192, 128),
    "80 wide": (1, 80, 80),
    "256 wide": (8, 256, 256),
}
LATENT = {"latent, 16 heads": (16, 576, 512), "latent, 128 heads": (128, 576, 512)}
FLAGS = {"plain": {}, "window, cap": {"windowed": True, "capped": True}, "paged": {"page": 16}}


def builds(thorough: bool = False) -> list[Build]:
    """Every shape in bf16, the group of 8 in all forms and dtypes, and the merge.

    ``thorough`` takes every shape in every form.
    """
    found = []
    for amd in (False, True):
        for name in SHAPES:
            for flag in FLAGS if thorough or name == "group of 8" else ("plain",):
                found.append(decode(name, "bf16", flag, amd))
        found += [decode(name, "bf16", "plain", amd) for name in LATENT]
        found += [decode("group of 8", dtype, "plain", amd) for dtype in ("fp32", "fp16")]
        found.append(decode("group of 8", "bf16", "plain", amd, aligned=False))
        found.append(decode("group of 8", "bf16", "plain", amd, wide=True))
    found += [merge(dtype, d_v) for dtype in ("bf16", "fp32") for d_v in (128, 512)]
    return found


def decode(shape: str, dtype: str, flag: str, amd: bool, aligned: bool = True, wide: bool = False) -> Build:
    """The decode kernel with parts to merge, for contiguous caches, with NVIDIA's tiles or AMD's."""
    latent = shape in LATENT
    rows, d, d_v = (LATENT if latent else SHAPES)[shape]
    w, how = widths(d, d_v, latent), FLAGS[flag]
    page = how.get("page")
    plan = plan_for(8, rows, 32_768, d, d_v, ITEMSIZE[dtype], MULTIPROCESSORS, latent, page is not None, amd)
    data, stride, unit = pointer(dtype, aligned), integer(aligned, wide), constant(1)
    arguments: dict[str, Argument] = {
        "Q": data, "K": data, "V": data, "LENGTHS": pointer("i32", aligned),
        "TABLE": pointer("i32", aligned) if page else constant(None), "OUT": pointer("fp32", aligned),
        "LSE": pointer("fp32", aligned), "H_kv": integer(False), "group": integer(False), "L_q": integer(False),
        "capacity": integer(False), "window": integer(False), "splits": integer(False), "scale": real(), "cap": real(),
    }  # fmt: skip
    for tensor in "qkv":
        arguments |= {f"stride_{tensor}_{axis}": stride for axis in ("batch", "head", "row")}
        arguments[f"stride_{tensor}_col"] = unit
    arguments |= {
        "stride_table": integer(aligned) if page else integer(True), "MAIN": constant(w.main), "D": constant(d),
        "DV": constant(d_v), "PAGE": constant(page or 1), "WINDOWED": constant("windowed" in how),
        "CAPPED": constant("capped" in how), "LATENT": constant(latent), "BLOCK_M": constant(plan.block_m),
        "BLOCK_N": constant(plan.block_n), "BLOCK_D": constant(w.block), "BLOCK_REST": constant(w.rest),
        "BLOCK_DV": constant(w.block_v), "STAGES": constant(plan.stages),
    }  # fmt: skip
    config = f"{shape} {dtype} {flag}" + ("" if aligned else " unaligned") + (" int64 strides" if wide else "")

    def expect(compiled: Compiled, target: str) -> list[str]:
        return [] if dtype == "fp32" else matrix_faults(plan, w, compiled, target)

    targets = ("gfx942",) if amd else ("sm_80", "sm_90", "sm_100")
    return Build(kernel._decode_kernel, config, arguments, plan.warps, None, aligned, targets=targets, expect=expect)


def matrix_faults(plan: Plan, w: Widths, compiled: Compiled, target: str) -> list[str]:
    """What is wrong with the number of matrix instructions: tiles of 16 or 32 rows take the narrow ones, 64 the wide."""
    found = compiled.instructions
    if target.startswith("gfx"):
        return [] if found["mfma"] else ["multiplies matrices without mfma"]
    if plan.block_m >= 64 and target != "sm_80":
        wide = "HGMMA" if target == "sm_90" else "UTCHMMA"
        return [] if found[wide] and not found["HMMA"] else [f"multiplies 64 rows without {wide}"]
    wanted = traffic.products(plan, w, 16, 8, 16)
    if plan.block_m >= 64 and found["HMMA"] > wanted:  # the compiler gives whole rows to a warp, and has some twice
        return []
    return [] if found["HMMA"] == wanted else [f"has {found['HMMA']} HMMA a warp, the tile sizes say {wanted}"]


def merge(dtype: str, d_v: int) -> Build:
    """The merge of fp32 parts into an output of ``dtype``."""
    arguments = {
        "PARTS": pointer("fp32"), "PARTS_LSE": pointer("fp32"), "OUT": pointer(dtype), "LSE": pointer("fp32"),
        "parts": integer(False), "n_rows": integer(False), "stride_o_part": integer(True), "stride_o_row": integer(True),
        "stride_o_col": constant(1), "stride_lse_part": integer(False), "stride_lse_row": constant(1),
        "DV": constant(d_v), "BLOCK_PARTS": constant(16), "BLOCK_DV": constant(padded(d_v)),
    }  # fmt: skip
    return Build(kernel._merge_kernel, f"{dtype} d_v={d_v}", arguments, 4)
