"""What is compiled ahead of time for products with quantised weights, and what must come out."""

from kernels.aot import Argument, Build, constant, integer, pointer, real
from kernels.quantised import kernel
from kernels.quantised.config import tile
from kernels.quantised.launch import FORMATS
from minillm.functional.nf4 import BLOCK, META_BLOCK

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def builds(thorough: bool = False) -> list[Build]:
    """Every format, few rows and many; both directions; blocks that run over the ends of rows; awkward tensors."""
    found = [build(kind, "bf16", rows, False) for kind in FORMATS for rows in (16, 512)]
    for kind in FORMATS if thorough else ("int8", "nf4_double"):
        found += [build(kind, "bf16", rows, True) for rows in (16, 512)]
    for kind in FORMATS if thorough else ("nf4_double",):
        for dtype in ("fp32", *(("fp16",) if thorough else ())):
            found += [build(kind, dtype, rows, backward) for rows in ((16, 512) if thorough else (512,))
                      for backward in ((False, True) if thorough else (True,))]  # fmt: skip
    for backward in (False, True) if thorough else (False,):
        found += [build("nf4_double", "bf16", 512, backward, whole=False)]
        found += [build("int8", "bf16", 512, backward, aligned=False)]
    return found


def build(kind: str, dtype: str, rows: int, backward: bool, whole: bool = True, aligned: bool = True) -> Build:
    """One direction for x of so many rows; `whole` says that blocks do not run over the ends of rows.

    Where they do, every weight loads its own code and scale: right for any shape, and its speed does not count.
    """
    size, whole = tile(rows, ITEMSIZE[dtype]), whole and kind != "int8"
    data, side = pointer(dtype, aligned), integer(aligned)
    fp32 = pointer("fp32", aligned)
    arguments: dict[str, Argument] = {
        "A": data, "CODES": pointer("i8" if kind == "int8" else "u8", aligned),
        "SCALE": pointer("i8", aligned) if kind == "nf4_double" else fp32,
        "META": fp32, "LEVELS": fp32, "OUT": data, "mean": real(), "n_rows": integer(False), "N": side, "K": side,
        "stride_a_row": side, "stride_a_col": constant(1), "FORMAT": constant(FORMATS[kind]), "BLOCK": constant(BLOCK),
        "META_BLOCK": constant(META_BLOCK), "WHOLE": constant(whole), "BACKWARD": constant(backward),
        "BLOCK_ROWS": constant(size.rows), "BLOCK_OUT": constant(size.out), "BLOCK_REDUCED": constant(size.reduced),
    }  # fmt: skip
    config = f"{kind} {dtype} rows={rows}{' backward' * backward}{' unaligned' * (not aligned)}"
    config += " blocks over ends" * (not whole and kind != "int8")
    return Build(
        kernel._product_kernel, config, arguments, size.warps, None, aligned, size.stages,
        shipped=whole or kind == "int8",
    )  # fmt: skip
