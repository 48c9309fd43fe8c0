"""What is compiled ahead of time for the rotation, and what must come out."""

from kernels.aot import Argument, Build, constant, integer, pointer
from kernels.rope import kernel, traffic
from kernels.rope.config import tile

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def builds(thorough: bool = False) -> list[Build]:
    """Both pairings in two precisions at the usual widths; turned back, with positions given, and awkward tensors."""
    found = []
    for pairing in ("interleaved", "half"):
        for dtype in ("bf16", "fp32"):
            found += [build(pairing, dtype, d) for d in ((64, 80, 96, 128, 256) if thorough else (64, 128))]
        found.append(build(pairing, "bf16", 128, backward=True))
        found.append(build(pairing, "bf16", 128, given=True))
        found.append(build(pairing, "bf16", 128, aligned=False))
    return [*found, build("half", "bf16", 128, wide=True)]


def build(
    pairing: str, dtype: str, d: int, *, backward: bool = False, given: bool = False, aligned: bool = True,
    wide: bool = False,
) -> Build:  # fmt: skip
    """The kernel for heads of width d."""
    size, stride, unit = tile(d, pairing), integer(aligned, wide), constant(1)
    data, single = pointer(dtype, aligned), pointer("fp32", aligned)
    arguments: dict[str, Argument] = {
        "X": data, "COS": single, "SIN": single, "POSITIONS": pointer("i64", aligned) if given else constant(None),
        "Y": data, "n_rows": integer(False), "heads": integer(False), "length": integer(False),
        "half": integer(aligned and d % 32 == 0), "start": integer(False),
    }  # fmt: skip
    for tensor in "xy":
        arguments |= {f"stride_{tensor}_{axis}": stride for axis in ("batch", "head", "row")}
        arguments[f"stride_{tensor}_col"] = unit
    arguments |= {
        "stride_table": stride, "stride_positions": integer(False), "INTERLEAVED": constant(pairing == "interleaved"),
        "BACKWARD": constant(backward), "BLOCK_ROWS": constant(size.block_rows), "BLOCK_HALF": constant(size.block_half),
    }  # fmt: skip
    marks = " backward" * backward + " positions" * given + " unaligned" * (not aligned) + " int64 strides" * wide
    exact = d & (d - 1) == 0
    expected = traffic.issued(size, ITEMSIZE[dtype]) if exact else None
    return Build(kernel._turn_kernel, f"{pairing} {dtype} d={d}{marks}", arguments, size.warps, expected, aligned)
