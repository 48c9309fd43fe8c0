r"""Whether the assembler of this machine may be trusted with these kernels: a matter of versions, decided by one function.

On Hopper (compute capability 9.0) the product of probabilities and values takes the probabilities from registers
while it runs on its own. Assemblers (ptxas) before 13.3 reuse such registers too early, so results can be wrong
without any sign. Triton 3.6 and 3.7 bring ptxas 12.8, Triton 3.9 brings 13.4. Where the assembler is older, the exact
problems of `witness.py` are solved once for each dtype and pair of head widths, with the kernels that the first call of
its kind needs anyway, and a wrong element refuses every further one. Float32 is multiplied without those instructions.
"""

import functools

import torch

from kernels import aot
from kernels.attention import witness

SAFE = (13, 3)
HOPPER = (9, 0)


def trusted(capability: tuple[int, int], assembler: str) -> bool:
    """Whether an assembler of this version ("12.8.93") may be trusted on a GPU of this capability, unwitnessed.

    An unknown version ("unknown") is not trusted.
    """
    if tuple(capability) != HOPPER:
        return True
    parts = assembler.split(".")
    if len(parts) < 2 or not all(part.isdigit() for part in parts):
        return False
    return tuple(int(part) for part in parts[:2]) >= SAFE


def refusal(where: str, assembler: str, wrong: dict[str, int]) -> str:
    """What is said when a witness was wrong, and what to do about it."""
    return (
        f"{where}: the kernels give wrong results on this GPU ({sum(wrong.values())} elements of exact problems, the first "
        f"in {next(iter(wrong))!r}), compiled with ptxas {assembler}. ptxas before {SAFE[0]}.{SAFE[1]} is known to miscompile "
        "them on Hopper. Set TRITON_PTXAS_PATH to a newer ptxas (CUDA 13.3 or later, or the one inside Triton 3.9), clear "
        "Triton's cache and start again."
    )


_solving = False  # the witnesses call the kernels themselves


@functools.cache
def _witnessed(index: int, dtype: torch.dtype, d: int, d_v: int) -> tuple[str, dict[str, int]]:
    """The assembler's version and the exact problems that come out wrong on this GPU (none where it is trusted)."""
    global _solving
    assembler = aot.assembler_version()
    if trusted(torch.cuda.get_device_capability(index), assembler):
        return assembler, {}
    _solving = True
    try:
        found = witness.of_kind(f"cuda:{index}", dtype, d, d_v)
        return assembler, {name: count for name, count in found if count}
    finally:
        _solving = False


def require_safe(where: str, device: torch.device, dtype: torch.dtype, d: int, d_v: int) -> None:
    """Raise RuntimeError where kernels for this dtype and these head widths have been seen to be wrong on this device."""
    if _solving or torch.compiler.is_compiling() or torch.version.hip or dtype == torch.float32:
        return
    assembler, wrong = _witnessed(device.index or 0, dtype, max(d, 16), max(d_v, 16))
    if wrong:
        raise RuntimeError(refusal(where, assembler, wrong))
