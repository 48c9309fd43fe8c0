"""What is compiled ahead of time for AdamW, and what must come out."""

import triton.language as tl

from kernels.adamw import kernel, traffic
from kernels.adamw.config import BLOCK, SUM_BLOCK, WARPS
from kernels.aot import Argument, Build, constant, integer, pointer, real

TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
SETTINGS = ("beta1", "rest1", "beta2", "rest2", "eps", "keep", "rate", "root")


def builds(thorough: bool = False) -> list[Build]:
    """The update with and without masters, the norm's two kernels, and tensors at odd addresses."""
    found = []
    for dtype in ("bf16", "fp32", *(("fp16",) if thorough else ())):
        found += [step(dtype, False), squares(dtype)] + ([step(dtype, True)] if dtype != "fp32" else [])
    return [*found, step("bf16", True, aligned=False), squares("bf16", aligned=False), clip()]


def _tables() -> dict[str, Argument]:
    return {"TABLE": pointer("i64"), "OWNER": pointer("i32")}


def step(dtype: str, has_master: bool, aligned: bool = True) -> Build:
    """The update of parameters and gradients of one type."""
    arguments = {
        **_tables(), "SCALE": pointer("fp32"), **{name: real() for name in SETTINGS},
        "THETA_TYPE": constant(TYPES[dtype]), "G_TYPE": constant(TYPES[dtype]), "HAS_MASTER": constant(has_master),
        "ALIGNED": constant(aligned), "BLOCK": constant(BLOCK),
    }  # fmt: skip
    config = f"{dtype}{' with masters' * has_master}{' unaligned' * (not aligned)}"
    wanted = traffic.issued(BLOCK, ITEMSIZE[dtype], has_master)
    return Build(kernel._step_kernel, config, arguments, WARPS, wanted, aligned)


def squares(dtype: str, aligned: bool = True) -> Build:
    """The sums of squares of one type's gradients."""
    arguments = {
        **_tables(), "PARTS": pointer("fp32"), "G_TYPE": constant(TYPES[dtype]), "ALIGNED": constant(aligned),
        "BLOCK": constant(BLOCK),
    }  # fmt: skip
    config = f"{dtype}{' unaligned' * (not aligned)}"
    return Build(kernel._squares_kernel, config, arguments, WARPS, (BLOCK * ITEMSIZE[dtype], 0), aligned)


def clip() -> Build:
    """The norm and the factor, by one program; its parts are so few that nobody counts bytes."""
    fp32 = pointer("fp32")
    arguments = {
        "PARTS": fp32, "NORM": fp32, "SCALE": fp32, "n_parts": integer(False), "max_norm": real(),
        "BLOCK": constant(SUM_BLOCK),
    }  # fmt: skip
    return Build(kernel._clip_kernel, "fp32", arguments, WARPS)
