"""What is compiled ahead of time for linear attention: every kernel at the widths in use, and what must come out."""

from kernels.aot import Argument, Build, constant, integer, pointer, real
from kernels.linear_attention import kernel
from kernels.linear_attention.config import Plan, padded, plan_for
from kernels.linear_attention.launch import ARRIVING_ROWS, SCAN_BLOCK

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
WIDTHS = ((64, 64), (128, 128), (64, 128), (256, 64))
MULTIPROCESSORS = 132
TARGETS = {"hopper": ("sm_90",), "blackwell": ("sm_100",), "other": ("sm_80", "gfx942")}
WIDE_TARGETS = {**TARGETS, "other": ("gfx942",)}  # 256 features spill 64 bytes on sm_80: right there, but not fast
ABSENT = constant(None)


def builds(thorough: bool = False) -> list[Build]:
    """The usual widths in bf16 with the map inside, one of them in all dtypes, without it, and with awkward tensors.

    ``thorough`` takes every width in fp16 too, with and without the map.
    """
    found = []
    for machine in TARGETS:
        for widths in WIDTHS:
            for dtype in ("bf16", "fp16") if thorough or widths == (64, 64) else ("bf16",):
                for elu in (True, False) if thorough else (True,):
                    found += products(dtype, *widths, elu, machine)
        found += products("fp32", 64, 64, True, machine)
        if not thorough:
            found += products("bf16", 64, 64, False, machine)
        found += products("bf16", 64, 64, True, machine, aligned=False)
        found += products("bf16", 64, 64, True, machine, wide=True)
    found += [scan(backwards) for backwards in (False, True)]
    found += [arriving(dtype, d_v) for dtype in ("bf16", "fp32") for d_v in (64, 256)]
    return found


def _strides(names: str, aligned: bool, wide: bool) -> dict[str, Argument]:
    found = {}
    for name in names.split():
        found |= {f"stride_{name}_{axis}": integer(aligned, wide) for axis in ("b", "h", "row")}
        found[f"stride_{name}_col"] = constant(1)
    return found


def _sizes(d_phi: int, d_v: int, elu: bool, plan: Plan) -> dict[str, Argument]:
    values = {"D_PHI": d_phi, "D_V": d_v, "ELU": elu, "CHUNK": plan.chunk, "BLOCK_PHI": padded(d_phi),
              "BLOCK_V": plan.block_v, "STAGES": plan.stages}  # fmt: skip
    return {name: constant(value) for name, value in values.items()}


def products(
    dtype: str, d_phi: int, d_v: int, elu: bool, machine: str, aligned: bool = True, wide: bool = False
) -> list[Build]:
    """The kernels that multiply matrices, in a sequence of several segments and of one."""
    plan = plan_for(64, 8192, d_phi, d_v, ITEMSIZE[dtype], MULTIPROCESSORS, machine)
    data, single = pointer(dtype, aligned), pointer("fp32", aligned)
    odd = integer(False)
    sizes = _sizes(d_phi, d_v, elu, plan)
    config = f"{dtype} {d_phi}x{d_v}" + (" elu" if elu else "") + ("" if aligned else " unaligned")
    config += " int64 strides" if wide else ""
    shape = {"H": odd, "L": odd, "per_segment": odd}
    four = _strides("q k v do", aligned, wide)
    share = data if d_v <= plan.block_v else single
    made = [
        (kernel._sums_kernel, "forwards ", {
            "X": data, "Y": data, "DEN": ABSENT, "C": ABSENT, "SUM": single, "SUM_W": single, **shape,
            **_strides("x y", aligned, wide), **sizes,
        }),
        (kernel._sums_kernel, "backwards ", {
            "X": data, "Y": data, "DEN": single, "C": single, "SUM": single, "SUM_W": single, **shape,
            **_strides("x y", aligned, wide), **sizes,
        }),
        (kernel._forward_kernel, "", {
            "Q": data, "K": data, "V": data, "S": single, "Z": single, "OUT": data, "DEN": single, "S_END": single,
            "Z_END": single, **shape, "eps": real(), **_strides("q k v", aligned, wide), **sizes,
        }),
        (kernel._dq_kernel, "", {
            "Q": data, "K": data, "V": data, "DO": data, "DEN": single, "C": single, "S": single, "Z": single,
            "DQ": share, **shape, "heads": odd, **four, **sizes,
        }),
        (kernel._dk_kernel, "", {
            "Q": data, "K": data, "V": data, "DO": data, "DEN": single, "C": single, "R": single, "W": single,
            "DK": share, "R_END": single, "W_END": single, **shape, "heads": odd, **four, **sizes,
        }),
        (kernel._dv_kernel, "", {
            "Q": data, "K": data, "DO": data, "DEN": single, "R": single, "DV": data, **shape,
            **_strides("q k do", aligned, wide), **sizes,
        }),
    ]  # fmt: skip
    if dtype == "fp16" and machine == "blackwell":  # Triton 3.7.1 gives up on its tensor memory there: use bfloat16
        return []
    targets = (WIDE_TARGETS if d_phi > 128 else TARGETS)[machine]
    return [
        Build(function, name + config, arguments, plan.warps, None, aligned, targets=targets, shipped=aligned)
        for function, name, arguments in made
    ]


def scan(backwards: bool) -> Build:
    """The walk over segments."""
    arguments = {
        "STATES": pointer("fp32"), "START": pointer("fp32"), "END": pointer("fp32"), "segments": integer(False),
        "n": integer(False), "BACKWARDS": constant(backwards), "BLOCK": constant(SCAN_BLOCK),
    }  # fmt: skip
    return Build(kernel._scan_kernel, "backwards" if backwards else "forwards", arguments, 4)


def arriving(dtype: str, d_v: int) -> Build:
    """What reaches the denominators."""
    data, single = pointer(dtype), pointer("fp32")
    arguments = {
        "DO": data, "OUT": data, "DEN": single, "C": single, "H": integer(False), "L": integer(False),
        "n_rows": integer(False), **_strides("do", True, False), "D_V": constant(d_v),
        "BLOCK_ROWS": constant(ARRIVING_ROWS), "BLOCK_V": constant(min(padded(d_v), 128)),
    }  # fmt: skip
    return Build(kernel._arriving_kernel, f"{dtype} d_v={d_v}", arguments, 4)
