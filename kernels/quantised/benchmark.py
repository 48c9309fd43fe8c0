"""What is timed for products with quantised weights: both directions beside a bf16 product, dequantising first, and
bitsandbytes and torchao where they can be imported."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kernels.contenders import Case, made
from kernels.quantised import launch, traffic
from kernels.quantised.config import Tile
from kernels.quantised.launch import FORMATS
from kernels.quantised.witness import weight_of
from minillm.checks import MissingPackageError, optional_import

SHAPES = tuple((rows, 4096, 4096) for rows in (1, 16, 512)) + (
    (1, 14_336, 4096),
    (16, 14_336, 4096),
    (4096, 4096, 4096),
)
QUICK_SHAPES = ((16, 4096, 4096), (512, 4096, 4096))
SMALLEST_SHAPES = ((4, 64, 128),)  # for trying the machinery out


def _package(name: str) -> Any:
    try:
        return optional_import(name, "dev")
    except (MissingPackageError, ImportError, RuntimeError):
        return None


def _bitsandbytes(w: torch.Tensor, kind: str) -> Callable | None:
    library = _package("bitsandbytes") if w.is_cuda else None
    if library is None or kind == "int8":
        return None
    packed, state = library.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=kind == "nf4_double")
    return lambda x: library.matmul_4bit(x, packed.t(), quant_state=state)


def _torchao(w: torch.Tensor, kind: str) -> Callable | None:
    library = _package("torchao.quantization") if w.is_cuda else None
    if library is None or kind != "int8":
        return None
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    linear.weight.data.copy_(w)
    library.quantize_(linear, library.Int8WeightOnlyConfig())
    return linear


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, compiled: bool = True) -> Iterator[Case]:
    """Every format at every shape; a product of bf16 weights is what the bytes saved are measured by."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for rows, n, k in shapes or (QUICK_SHAPES if quick else SHAPES):
        for kind in FORMATS:
            yield from made(_of_format(kind, rows, n, k, dtype, device, compiled), f"{kind} {rows}x{k} by {n}")


def _of_format(kind: str, rows: int, n: int, k: int, dtype: torch.dtype, device: str, compiled: bool) -> Iterator[Case]:
    generator = torch.Generator(device).manual_seed(0)
    x, dy, w = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for shape in ((rows, k), (rows, n), (n, k))
    )
    # Codes made on the GPU: quantising real weights is the host's work and would take longer than the timing.
    weight, size = weight_of(kind, torch.randint(-1, 2, (n, k), device=device)), f"{kind} {rows}x{k} by {n}"
    peers: dict[str, Callable] = {
        "ours": lambda a, q=weight: launch.product(a, q),
        "torch product": lambda a, w=w: a @ w.t(),
    }
    for name, make in (("bitsandbytes", _bitsandbytes), ("torchao", _torchao)):
        found = make(w, kind)
        if found is not None:
            peers[name] = found
    if compiled and kind == "int8":
        torch._dynamo.reset()
        codes, scale = weight.codes, weight.scale.to(dtype)
        peers["torch.compile"] = torch.compile(lambda a, c=codes, s=scale: a @ (c.to(a.dtype) * s).t())
    moved = traffic.product_bytes(rows, n, k, x.element_size(), kind)
    flops, flush = traffic.product_flops(rows, n, k), rows <= 16
    named = str(dtype).removeprefix("torch.")
    forward = {name: lambda f=f, x=x: f(x) for name, f in peers.items()}
    yield Case(f"forward {size}", named, moved, forward, flops, flush, f"forward {kind} {k} by {n}", rows)
    back = {
        "ours": lambda d=dy, q=weight: launch.product(d, q, True), "torch product": lambda d=dy, w=w: d @ w
    }  # fmt: skip
    yield Case(f"backward {size}", named, moved, back, flops, flush, f"backward {kind} {k} by {n}", rows)


def sweep_cases(device: str, shapes=((16, 4096, 4096), (512, 4096, 4096))) -> Iterator[Case]:
    """Other tiles, to choose those of `config.py` from."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for rows, n, k in shapes:
        x = torch.randn(rows, k, device=device).to(dtype)
        for kind in FORMATS:
            weight = weight_of(kind, torch.randint(-1, 2, (n, k), device=device))
            heights = (16,) if rows <= 16 else (64, 128)
            tiles = [Tile(h, out, 64, warps, stages) for h in heights for out in (16, 32, 64)
                     for warps in (2, 4, 8) for stages in (1, 2, 3)]  # fmt: skip
            tried = {str(t): lambda t=t, q=weight, x=x: launch.product(x, q, tile=t) for t in tiles}
            moved = traffic.product_bytes(rows, n, k, x.element_size(), kind)
            yield Case(f"forward {kind} {rows}x{k} by {n}", "bfloat16", moved, tried, traffic.product_flops(rows, n, k))
