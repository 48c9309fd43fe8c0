"""What is timed for the norms: forward and backward, beside torch, torch.compile and Liger where importable."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contenders import Case, alike, brief, made, prepared
from kernels.norm import launch, op, traffic
from kernels.norm.config import BackwardPlan, backward_plan, forward_tile
from minillm.checks import MissingPackageError, optional_import

# The most important first: a run may have no time for the last.
SHAPES = ((8192, 4096), (4096, 16_384), (16_384, 1024), (1024, 65_536), (4096, 8192), (8192, 5120))
FLOAT32_SHAPES = ((8192, 4096),)
QUICK_SHAPES = ((8192, 4096),)
SMALLEST_SHAPES = ((4, 64),)  # for trying the machinery out
EPS = 1e-5


def _torch(name: str) -> Callable:
    def rms_norm(x, g, eps):
        return F.rms_norm(x, x.shape[-1:], g, eps)

    def layer_norm(x, g, b, eps):
        return F.layer_norm(x, x.shape[-1:], g, b, eps)

    def add_rms_norm(x, r, g, eps):
        s = x + r
        return s, F.rms_norm(s, s.shape[-1:], g, eps)

    def add_layer_norm(x, r, g, b, eps):
        s = x + r
        return s, F.layer_norm(s, s.shape[-1:], g, b, eps)

    return {f.__name__: f for f in (rms_norm, layer_norm, add_rms_norm, add_layer_norm)}[name]


LIGER = {  # where Liger keeps the function of the same meaning, and how it is called
    "rms_norm": ("rms_norm", "LigerRMSNormFunction", lambda f, x, g, eps: f(x, g, eps, 0.0, "llama", False)),
    "layer_norm": ("layer_norm", "LigerLayerNormFunction", lambda f, x, g, b, eps: f(x, g, b, eps)),
    "add_rms_norm": (
        "fused_add_rms_norm", "LigerFusedAddRMSNormFunction",
        lambda f, x, r, g, eps: f(x, r, g, eps, 0.0, "llama", False)[::-1],
    ),
}  # fmt: skip


def _liger(name: str) -> Callable | None:
    """Liger's function of the same meaning, or None where it is not installed or has none."""
    if name not in LIGER:
        return None
    module, function, call = LIGER[name]
    try:
        found = getattr(optional_import(f"liger_kernel.ops.{module}", "dev"), function)
    except (MissingPackageError, AttributeError):
        return None
    return lambda *operands: call(found.apply, *operands)


def _operands(name: str, n_rows: int, d: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype).requires_grad_()

    streams = [normal(n_rows, d) for _ in range(2 if name.startswith("add_") else 1)]
    return streams + [normal(d) for _ in range(2 if name.endswith("layer_norm") else 1)]


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _agree(ours: Callable, peer: Callable, operands: list[Tensor]) -> bool:
    """Whether a peer computes the same thing; nothing else is timed beside ours."""
    return alike(_outputs(peer(*operands, EPS)), _outputs(ours(*operands, EPS)))


def _peers(name: str, operands: list[Tensor], compiled: bool, say: Callable[[str], None]) -> dict[str, Callable]:
    plain = _torch(name)
    candidates: dict[str, Callable | None] = {"torch": plain, "liger": _liger(name)}
    if compiled:
        torch._dynamo.reset()
        candidates["torch.compile"] = torch.compile(plain, dynamic=False)
    found = {}
    for peer, function in candidates.items():
        if function is None:
            continue
        try:
            with torch.no_grad():
                agrees = _agree(getattr(op, name), function, operands)
        except Exception as error:  # a peer that does not run on this machine is left out, and said to be
            say(f"{peer} {name}: left out ({brief(error)})")
            continue
        if agrees:
            found[peer] = function
        else:
            say(f"{peer} {name}: left out, its results differ from ours")
    return found


def _backward_call(function: Callable, operands: list[Tensor]) -> Callable[[], Any]:
    outputs = _outputs(function(*operands, EPS))
    seeds = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, operands, seeds, retain_graph=True)


def _forward_call(function: Callable, operands: list[Tensor]) -> Callable[[], Any]:
    def call():
        with torch.no_grad():
            return function(*operands, EPS)

    return call


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, compiled: bool = True) -> Iterator[Case]:
    """Every function, forward and backward, at every shape and dtype."""
    for n_rows, d in shapes or (QUICK_SHAPES if quick else SHAPES):
        low = (torch.bfloat16,) if device == "cuda" else ()
        for dtype in (*low, torch.float32) if (n_rows, d) in FLOAT32_SHAPES or not low else low:
            for name in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"):
                yield from made(_of_shape(name, n_rows, d, dtype, device, compiled, say), f"{name} {n_rows}x{d}")


def _of_shape(
    name: str, n_rows: int, d: int, dtype: torch.dtype, device: str, compiled: bool, say: Callable[[str], None]
) -> Iterator[Case]:
    operands = _operands(name, n_rows, d, dtype, device)
    contenders = {"ours": getattr(op, name), **_peers(name, operands, compiled, say)}
    flags = {"centred": name.endswith("layer_norm"), "residual": name.startswith("add_"),
             "shift": name.endswith("layer_norm")}  # fmt: skip
    size, kind = operands[0].element_size(), str(dtype).removeprefix("torch.")
    yield Case(
        f"{name} forward {n_rows}x{d}", kind, traffic.forward_bytes(n_rows, d, size, size, **flags),
        {peer: _forward_call(function, operands) for peer, function in contenders.items()},
        line=f"{name} forward {kind}", size=d,
    )  # fmt: skip
    makers = {peer: partial(_backward_call, function, operands) for peer, function in contenders.items()}
    yield Case(
        f"{name} backward {n_rows}x{d}", kind, traffic.backward_bytes(n_rows, d, size, size, **flags),
        prepared(makers, say, f"{name} backward {n_rows}x{d}"), line=f"{name} backward {kind}", size=d,
    )  # fmt: skip


def sweep_cases(device: str, shapes=SHAPES) -> Iterator[Case]:
    """RMSNorm and LayerNorm in bf16 with the neighbours of every launch size, to see whether one is better."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for n_rows, d in shapes:
        for centred in (False, True):
            x, g = (t.detach() for t in _operands("rms_norm", n_rows, d, dtype, device))
            yield from _sweep(x, g, torch.zeros_like(g) if centred else None)


def _sweep(x: Tensor, g: Tensor, b: Tensor | None) -> Iterator[Case]:
    (n_rows, d), size, centred = x.shape, x.element_size(), b is not None
    shape, dtype = f"{'layer_norm' if centred else 'rms_norm'} %s {n_rows}x{d}", str(x.dtype).removeprefix("torch.")
    flags = {"centred": centred, "residual": False, "shift": centred}
    tile = forward_tile(d)
    tiles = [replace(tile, warps=w) for w in (tile.warps // 2, tile.warps, tile.warps * 2) if 1 <= w <= 32]
    yield Case(
        shape % "forward", dtype, traffic.forward_bytes(n_rows, d, size, size, **flags),
        {str(t): partial(launch.forward, x, None, g, b, EPS, centred, t) for t in tiles},
    )  # fmt: skip
    _, _, mean, rho = launch.forward(x, None, g, b, EPS, centred)
    plan = backward_plan(n_rows, d, size, launch.multiprocessors(x.device), centred=centred, residual=False)
    call = partial(launch.backward, torch.randn_like(x), None, x, g, mean, rho, b.dtype if b is not None else None)
    yield Case(
        shape % "backward", dtype, traffic.backward_bytes(n_rows, d, size, size, **flags),
        {str(other): partial(call, other) for other in _neighbours(plan, n_rows)},
    )  # fmt: skip


def _neighbours(plan: BackwardPlan, n_rows: int) -> list[BackwardPlan]:
    """Half and double the warps, one to three stages, half and double the programs."""
    found = {}
    for warps in (plan.tile.warps // 2, plan.tile.warps, plan.tile.warps * 2):
        for stages in (1, 2, 3):
            for programs in (plan.programs // 2, plan.programs, plan.programs * 2):
                if 1 <= warps <= 32 and 1 <= programs <= n_rows:
                    other = replace(plan, tile=replace(plan.tile, warps=warps, stages=stages), programs=programs)
                    found[str(other)] = other
    return list(found.values())
