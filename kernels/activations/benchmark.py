"""What is timed for the gated units: forward and backward beside torch, torch.compile and Liger where importable."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from kernels.activations import op, traffic
from kernels.contenders import Case, made, prepared
from minillm.checks import MissingPackageError, optional_import

SHAPES = ((16_384, 2048), (8192, 8192), (8192, 14_336), (8192, 32_768))
QUICK_SHAPES = ((8192, 14_336),)
SMALLEST_SHAPES = ((4, 64),)  # for trying the machinery out
PLAIN: dict[str, Callable] = {
    "swiglu_pair": lambda value, gate: value * F.silu(gate), "geglu_pair": lambda value, gate: value * F.gelu(gate)
}  # fmt: skip


def _liger() -> Callable | None:
    """Liger's SwiGLU, whose gate comes first; None where it is not installed. (Its GEGLU is the approximation.)"""
    try:
        function = optional_import("liger_kernel.ops.swiglu", "dev").LigerSiLUMulFunction
    except (MissingPackageError, AttributeError):
        return None
    # It writes gradients over its operands, so it is timed on copies that autograd lets it have.
    return lambda value, gate: function.apply(gate, value)


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, compiled: bool = True) -> Iterator[Case]:
    """Both units, forward and backward, at every shape."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for n_rows, d in shapes or (QUICK_SHAPES if quick else SHAPES):
        generator = torch.Generator(device).manual_seed(0)
        value, gate, dy = (
            torch.randn(n_rows, d, generator=generator, device=device, dtype=torch.float32).to(dtype) for _ in range(3)
        )
        for name, plain in PLAIN.items():
            yield from made(_of_unit(name, plain, value, gate, dy, compiled, say), f"{name} {n_rows}x{d}")


def _of_unit(
    name: str, plain: Callable, value: torch.Tensor, gate: torch.Tensor, dy: torch.Tensor, compiled: bool,
    say: Callable[[str], None],
) -> Iterator[Case]:  # fmt: skip
    n_rows, d = value.shape
    peers: dict[str, Callable] = {"ours": getattr(op, name), "torch": plain}
    liger = _liger() if name == "swiglu_pair" else None
    if liger is not None:
        peers["liger"] = liger
    if compiled:
        torch._dynamo.reset()
        peers["torch.compile"] = torch.compile(plain, dynamic=False)
    kind, size = str(value.dtype).removeprefix("torch."), value.element_size()
    forward = {peer: _forward(f, value, gate) for peer, f in peers.items()}
    moved = traffic.forward_bytes(n_rows, d, size)
    yield Case(f"{name} forward {n_rows}x{d}", kind, moved, forward, line=f"{name} forward", size=d)
    makers = {peer: partial(_backward, f, value, gate, dy) for peer, f in peers.items()}
    backward, moved = prepared(makers, say, f"{name} backward"), traffic.backward_bytes(n_rows, d, size)
    yield Case(f"{name} backward {n_rows}x{d}", kind, moved, backward, line=f"{name} backward", size=d)


def _forward(function: Callable, value: torch.Tensor, gate: torch.Tensor) -> Callable[[], Any]:
    def call():
        with torch.no_grad():
            return function(value, gate)

    return call


def _backward(function: Callable, value: torch.Tensor, gate: torch.Tensor, dy: torch.Tensor) -> Callable[[], Any]:
    operands = value.clone().requires_grad_(), gate.clone().requires_grad_()
    y = function(*operands)
    return lambda: torch.autograd.grad(y, operands, dy, retain_graph=True)


def sweep_cases(device: str, shapes=()) -> Iterator[Case]:
    """Nothing to choose from: one pass, one tile."""
    yield from ()
