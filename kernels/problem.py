"""One problem for a kernel: named inputs with values and layouts, and how they become torch tensors.

Values are float64 arrays that the kernel's dtype represents exactly, so that the reference and the kernel see
the same numbers. Every tensor lies inside a larger buffer of NaN: a kernel that reads outside its tensor, or
between the elements of a strided one, gets NaN, and one that writes there is found by comparing the bits.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

BORDER = 16  # elements of NaN on both sides; keeps a tensor aligned to 16 bytes


@dataclass(frozen=True)
class Problem:
    """What a function of a family is called with, in this order, and the cotangents that are pulled back.

    ``inputs`` are differentiable and of the problem's dtype, ``constants`` are further tensors with dtypes of their
    own (ids, masks, numbers nobody differentiates; None for one that is absent), ``parameters`` anything else.
    A cotangent of None belongs to an output without a gradient. ``dtypes`` names the inputs and results (`y`, `dx`)
    whose dtype is not the problem's.
    """

    function: str
    dtype: str
    inputs: Mapping[str, np.ndarray]
    cotangents: Mapping[str, Any]  # arrays, or None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    launch: Any = None  # sizes forced on the launch, where a property varies them
    note: str = ""
    constants: Mapping[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def dtype_of(self, name: str) -> str:
        """The dtype of an input or a result."""
        return self.dtypes.get(name, self.dtype)

    def __len__(self) -> int:
        """Elements of all inputs."""
        return sum(array.size for array in self.inputs.values())

    def __bool__(self) -> bool:
        return True  # a problem without elements is one too

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {list(a.shape)}" for name, a in self.inputs.items())
        constants = ", ".join(f"{name} {list(a.shape)}" for name, a in self.constants.items() if a is not None)
        parameters = ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}"
            for name, value in self.parameters.items()
        )
        layouts = ", ".join(f"{name} {layout}" for name, layout in self.layouts.items() if layout != "contiguous")
        details = [
            sizes,
            constants,
            self.dtype,
            parameters,
            layouts,
            self.note,
            "" if self.launch is None else str(self.launch),
        ]
        return f"{self.function}({'; '.join(detail for detail in details if detail)})"

    def fingerprint(self) -> bytes:
        """The same bytes for the same problem, and for no other."""
        found = hashlib.blake2b()
        for part in (self.inputs, self.constants, self.cotangents):
            for name, value in part.items():
                found.update(name.encode() + b" absent" * (value is None))
                if value is not None:
                    array = np.asarray(value)
                    found.update(repr((array.shape, array.dtype.str)).encode() + array.tobytes())
        plain = self.function, self.dtype, self.parameters, self.layouts, self.launch, self.dtypes
        found.update(repr([dict(part) if isinstance(part, Mapping) else part for part in plain]).encode())
        return found.digest()

    def show(self, limit: int = 64) -> str:
        """The case with its numbers, for somebody who has to find a bug with it."""
        lines = [repr(self)]
        seeds = {f"d{key}": value for key, value in self.cotangents.items()}
        for name, array in {**self.inputs, **self.constants, **seeds}.items():
            if array is None:
                continue
            text = np.array2string(array, precision=8, threshold=limit, edgeitems=3, separator=", ", prefix=" " * 8)
            lines.append(f"  {name:>4} = {text}")
        return "\n".join(lines)


def _contiguous(array: np.ndarray, new: Callable) -> torch.Tensor:
    return new(array.shape)


def _padded(array: np.ndarray, new: Callable) -> torch.Tensor:
    """Rows longer than the tensor: the row stride is not the row length, and not divisible by 16 bytes."""
    return new((*array.shape[:-1], array.shape[-1] + 3))[..., 2 : 2 + array.shape[-1]]


def _sliced(array: np.ndarray, new: Callable) -> torch.Tensor:
    """Every second column of a wider tensor."""
    return new((*array.shape[:-1], 2 * array.shape[-1]))[..., ::2]


def _transposed(array: np.ndarray, new: Callable) -> torch.Tensor:
    """Columns far apart, rows close together."""
    return new(array.shape[::-1]).permute(*reversed(range(array.ndim)))


def _swapped(array: np.ndarray, new: Callable) -> torch.Tensor:
    """The first two axes stored in the other order, as after a transposition of batch and length."""
    if array.ndim < 3:
        return new(array.shape)
    return new((array.shape[1], array.shape[0], *array.shape[2:])).transpose(0, 1)


LAYOUTS: dict[str, Callable] = {
    "contiguous": _contiguous, "padded": _padded, "sliced": _sliced, "transposed": _transposed, "swapped": _swapped,
}  # fmt: skip


def conform(array: np.ndarray, layout: str) -> np.ndarray:
    """The nearest array that the layout can hold: equal rows where a row is repeated, one value where one is."""
    if array.size and layout == "expanded":
        return np.broadcast_to(array.reshape(-1, array.shape[-1])[0], array.shape).copy()
    return np.full(array.shape, array.flat[0]) if array.size and layout == "constant" else array


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name."""
    return getattr(torch, name)


def stranger(dtype: torch.dtype) -> float | int | bool:
    """A value that no tensor of a problem holds, for the memory around it: NaN, -99 for integers, true for masks."""
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else -99


@dataclass
class Placed:
    """A tensor inside its guarded buffer, and what the buffer held at first."""

    tensor: torch.Tensor
    buffer: torch.Tensor
    before: torch.Tensor

    def untouched(self) -> int:
        """How many elements of the whole buffer, borders included, no longer have their first bits."""
        return mismatches(self.buffer, self.before)


def mismatches(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements differ in their bits (NaN equals the same NaN, 0 differs from -0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel(), 1)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return int((a.contiguous().view(whole) != b.contiguous().view(whole)).sum())


def place(array: np.ndarray, dtype: str, device: str, layout: str = "contiguous") -> Placed:
    """A tensor with these values in this layout, between borders of NaN (of `stranger` where there is no NaN).

    The layouts "expanded" (one row, repeated without being stored again) and "constant" (one element, as the
    gradient of a sum has it) hold these values only if `conform` made them so.
    """
    held: list[torch.Tensor] = []

    def new(shape: tuple[int, ...]) -> torch.Tensor:
        count = int(np.prod(shape))
        buffer = torch.full(
            (count + 2 * BORDER,), stranger(torch_dtype(dtype)), dtype=torch_dtype(dtype), device=device
        )
        held.append(buffer)
        return buffer[BORDER : BORDER + count].view(shape)

    values = torch.from_numpy(np.array(array, order="C")).to(torch_dtype(dtype))
    if layout in ("expanded", "constant") and array.size:
        first = values.reshape(-1, values.shape[-1])[0] if layout == "expanded" else values.reshape(-1)[:1]
        base = new(tuple(first.shape))
        base.copy_(first)
        tensor = base.expand(values.shape)
    else:
        tensor = LAYOUTS.get(layout, _contiguous)(array, new)
        tensor.copy_(values)
    return Placed(tensor, held[0], held[0].clone())


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values as float64."""
    return tensor.detach().to("cpu", torch.float64).numpy()
