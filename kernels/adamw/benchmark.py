"""What is timed for AdamW: a step of a model's tensors beside torch's fused, foreach and compiled ones, and Apex's."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernels.adamw import launch, op, traffic
from kernels.contenders import Case, made
from minillm.checks import MissingPackageError, optional_import

MODELS = {"124M": (12, 768, 3072, 50_304), "1.2B": (16, 2048, 8192, 50_304)}  # layers, d_model, d_ff, V
QUICK_MODELS = ("124M",)
SMALLEST_SHAPES = ((1, 16, 32, 64),)  # for trying the machinery out
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def shapes_of(layers: int, d: int, d_ff: int, V: int) -> list[tuple[int, ...]]:
    """The tensors of a decoder with tied embeddings."""
    block = [(d,), (3 * d, d), (d, d), (d,), (2 * d_ff, d), (d, d_ff)]
    return [(V, d), *(block * layers), (d,)]


def _parameters(shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for shape in shapes:
        p = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
        p.grad = torch.randn(shape, generator=generator, device=device).to(dtype)
        found.append(p)
    return found


def _peers(parameters: list[torch.Tensor], compiled: bool) -> dict[str, Callable[[], Any]]:
    """Steps of torch on the same tensors; float32 moments only where the parameters are float32, as torch has it."""
    made: dict[str, Any] = {"torch foreach": torch.optim.AdamW(parameters, foreach=True, **SETTINGS)}
    if parameters[0].is_cuda:
        made["torch fused"] = torch.optim.AdamW(parameters, fused=True, **SETTINGS)
        try:
            apex = optional_import("apex.optimizers", "dev")
            made["apex"] = apex.FusedAdam(parameters, **SETTINGS)
        except (MissingPackageError, AttributeError, RuntimeError):
            pass
    peers = {name: optimizer.step for name, optimizer in made.items()}
    if compiled:
        torch._dynamo.reset()
        optimizer = torch.optim.AdamW(parameters, foreach=True, **SETTINGS)
        peers["torch.compile"] = torch.compile(lambda: optimizer.step(), fullgraph=False)
    return peers


def _updates(optimizer: op.AdamW) -> Callable[[], None]:
    """Our step without the norm, which torch's does not compute either."""
    scale = torch.ones(1, device=optimizer.parameters[0].device)
    settings = launch.Settings(1e-3, 0.9, 0.95, 1e-8, 0.1, 10)
    (batch,) = optimizer._batches
    gradients = [p.grad for p in optimizer.parameters]

    def call() -> None:
        batch.read(gradients)  # type: ignore[arg-type]
        launch.step(batch, scale, settings)

    return call


def _clipped(parameters: list[torch.Tensor]) -> Callable[[], None]:
    """The norm, the clipping and the step of torch."""
    fused = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, fused=fused, foreach=not fused, **SETTINGS)

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return call


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, compiled: bool = True) -> Iterator[Case]:
    """Float32 and, on a GPU, bfloat16 with masters (torch's has none: it moves 14 bytes an element, ours 28)."""
    sizes = {str(s): s for s in shapes} if shapes else {n: MODELS[n] for n in (QUICK_MODELS if quick else MODELS)}
    for name, size in sizes.items():
        for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
            yield from made(_of_model(name, size, dtype, device, compiled), f"step {name}")


def _of_model(name: str, size: tuple[int, ...], dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    parameters = _parameters(shapes_of(*size), device, dtype)
    n, kind = sum(p.numel() for p in parameters), str(dtype).removeprefix("torch.")
    optimizer = op.AdamW(parameters, **SETTINGS)
    itemsize, has_master = parameters[0].element_size(), dtype != torch.float32
    contenders = {"ours": _updates(optimizer), **_peers(parameters, compiled)}
    moved = traffic.step_bytes(n, itemsize, has_master)
    yield Case(f"step {name}", kind, moved, contenders, line=f"step {kind}", size=n)
    clipped = {"ours": lambda o=optimizer: o.step(1.0), "torch": _clipped(parameters)}
    yield Case(f"clip and step {name}", kind, moved + n * itemsize, clipped, line=f"clip and step {kind}", size=n)


def sweep_cases(device: str, shapes=()) -> Iterator[Case]:
    """Nothing to choose from: one pass, one tile."""
    yield from ()
