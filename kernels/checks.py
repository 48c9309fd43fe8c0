"""What every family refuses: tensors of a dtype or on a device that its kernels cannot take."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels import launching
from minillm.checks import require

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_floats(
    where: str, named: Iterable[tuple[str, Tensor | None]], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    """Refuse floating-point operands that the kernels cannot take; None stands for an absent one."""
    given = [(name, tensor) for name, tensor in named if tensor is not None]
    wanted = " or ".join(", ".join(str(d).removeprefix("torch.") for d in dtypes).rsplit(", ", 1))
    for name, tensor in given:
        require(tensor.dtype in dtypes, where, name, wanted, tensor, error=TypeError)
        require(
            tensor.dtype != torch.bfloat16 or not launching.INTERPRETED, where, name,
            "float32 or float16 in the interpreter (TRITON_INTERPRET=1)", tensor, error=TypeError,
            hint="Triton's interpreter computes with the bit patterns of bfloat16, so the numbers would be garbage; "
            "bfloat16 needs a GPU.",
        )  # fmt: skip
    check_places(where, given)


def check_integers(where: str, named: Iterable[tuple[str, Tensor | None]], dtypes=(torch.int64, torch.int32)) -> None:
    """Refuse integer operands (ids, lengths, masks) of a dtype or on a device that the kernels cannot take."""
    given = [(name, tensor) for name, tensor in named if tensor is not None]
    wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    for name, tensor in given:
        require(tensor.dtype in dtypes, where, name, wanted, tensor, error=TypeError)
    check_places(where, given)


def check_places(where: str, given: list[tuple[str, Tensor]]) -> None:
    """Refuse tensors that are not on a GPU (outside of the interpreter) or not all on the device of the first."""
    for name, tensor in given:
        require(
            tensor.device.type == "cuda" or launching.INTERPRETED, where, name, "on a GPU", f"a tensor on {tensor.device}",
            hint="Set TRITON_INTERPRET=1 before triton is imported to run the kernels on a CPU, slowly.",
        )  # fmt: skip
        first, device = given[0][0], given[0][1].device
        require(
            tensor.device == device, where, name, f"on the device of {first}, {device}", f"a tensor on {tensor.device}"
        )
