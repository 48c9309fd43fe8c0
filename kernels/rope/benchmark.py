"""What is timed for the rotation: out of place and in place beside torch, torch.compile and Liger where importable."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from kernels.contenders import Case, made
from kernels.rope import op, traffic
from minillm.checks import MissingPackageError, optional_import
from minillm.functional.positions import rotation_angles

SHAPES = ((8, 32, 4096, 128), (2, 32, 32_768, 128), (8, 16, 4096, 64))  # B, H, L, d_head
QUICK_SHAPES = ((8, 32, 4096, 128),)
SMALLEST_SHAPES = ((1, 2, 8, 16),)  # for trying the machinery out


def torch_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotation of halves as it is written with torch, in the dtype of x."""
    a, b = x.chunk(2, -1)
    c, s = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def _liger() -> Callable | None:
    try:
        function = optional_import("liger_kernel.ops.rope", "dev").LigerRopeFunction
    except (MissingPackageError, AttributeError):
        return None

    def call(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> Any:  # it turns queries and keys together: here two halves of the heads
        double = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
        q, k = x.chunk(2, 1)
        return function.apply(q, k, *double)

    return call


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, compiled: bool = True) -> Iterator[Case]:
    """Both pairings, forward and in place, at every shape."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for batch, heads, length, d in shapes or (QUICK_SHAPES if quick else SHAPES):
        cos, sin = op.table(rotation_angles(np.arange(length), d), device=device)
        x = torch.randn(batch, heads, length, d, device=device).to(dtype)
        size = traffic.turn_bytes(batch, heads, length, d, x.element_size())
        kind, shape = str(dtype).removeprefix("torch."), f"{batch}x{heads}x{length}x{d}"
        yield from made(_of_shape(x, cos, sin, compiled, kind, shape, size), shape)


def _of_shape(x, cos, sin, compiled: bool, kind: str, shape: str, size: int) -> Iterator[Case]:
    peers: dict[str, Callable[[], Any]] = {"torch": lambda: torch_half(x, cos, sin)}
    liger = _liger()
    if liger is not None:
        peers["liger"] = lambda: liger(x, cos, sin)
    if compiled:
        torch._dynamo.reset()
        quickened = torch.compile(torch_half, dynamic=False)
        peers["torch.compile"] = lambda: quickened(x, cos, sin)
    turned = x.clone()
    ours: dict[str, Callable[[], Any]] = {
        "half": lambda: op.rope(x, cos, sin, pairing="half"),
        "interleaved": lambda: op.rope(x, cos, sin),
        "half in place": lambda: op.rope_(turned, cos, sin, pairing="half"),
    }
    for name, call in ours.items():
        yield Case(
            f"{name} {shape}", kind, size, {"ours": call, **peers}, line=f"{name} d={x.shape[3]}", size=x.shape[2]
        )


def sweep_cases(device: str, shapes=()) -> Iterator[Case]:
    """Nothing to choose from: one pass, one tile."""
    yield from ()
