"""What is timed for attention: forward and backward over length, head width and mask, beside every peer that runs.

The limit of a case is set by the measured rate of matrix products; operations are counted over the pairs that a
mask lets through (`traffic.py`), five products for the backward. Lengths share 16k tokens, as is the custom.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.attention import launch, op, peers, traffic
from kernels.attention.config import Plan, Tile
from kernels.attention.launch import Pattern
from kernels.contenders import Case, alike, brief, made


@dataclass(frozen=True)
class Shape:
    """One case: B sequences of L tokens, H query heads on H_kv key heads, and the mask."""

    B: int
    H: int
    H_kv: int
    L: int
    d: int
    d_v: int
    causal: bool = False
    window: int | None = None
    documents: int = 0

    @property
    def name(self) -> str:
        """How the case is called in tables."""
        mask = f"window {self.window}" if self.window else "causal" if self.causal else "full"
        packed = f" {self.documents} documents" if self.documents else ""
        heads = f"H={self.H}" + (f"/{self.H_kv}" if self.H_kv != self.H else "")
        width = f"{self.d}" + (f"/{self.d_v}" if self.d_v != self.d else "")
        return f"{mask}{packed} d={width} {self.B}x{self.L} {heads}"


def _of_16k(L: int, d: int, causal: bool) -> Shape:
    H = 2048 // d
    return Shape(max(16_384 // L, 1), H, H, L, d, d, causal)


GROUPED, PACKED = Shape(2, 32, 4, 8192, 128, 128, True), Shape(1, 16, 16, 16_384, 128, 128, True, None, 24)
# The most important first, forward and backward in turn: a run may have no time for the last.
FORWARD = (
    *(_of_16k(L, 128, causal) for L in (8192, 4096, 16_384) for causal in (True, False)),
    GROUPED,
    Shape(1, 16, 16, 32_768, 128, 128, True, 1024),
    PACKED,
    *(_of_16k(L, 64, causal) for L in (16_384, 4096) for causal in (True, False)),
    Shape(2, 16, 16, 8192, 192, 128, True),
    _of_16k(8192, 256, True),
    *(_of_16k(1024, 128, causal) for causal in (True, False)),
)
BACKWARD = (
    *(_of_16k(L, 128, causal) for L in (8192, 4096, 16_384) for causal in (True, False)),
    GROUPED,
    PACKED,
    _of_16k(8192, 64, True),
    *(_of_16k(1024, 128, causal) for causal in (True, False)),
)
QUICK = (_of_16k(4096, 128, False), _of_16k(8192, 128, True))
SMALLEST = (
    Shape(1, 2, 1, 32, 16, 16), Shape(1, 2, 2, 32, 16, 16, True), Shape(1, 2, 2, 32, 16, 16, True, 8),
    Shape(1, 2, 2, 32, 16, 16, True, None, 3),
)  # fmt: skip


def starts_of(shape: Shape, device: str) -> Tensor:
    """Where the documents of a packed case begin: lengths from short to long, the same in every run."""
    weights = torch.arange(1, shape.documents + 1, dtype=torch.float64)
    cuts = (weights.cumsum(0) / weights.sum() * shape.L).round().to(torch.int32)
    return torch.cat([torch.zeros(1, dtype=torch.int32), cuts]).to(device)


def operands(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k and v, laid out as projections leave them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, width: int) -> Tensor:
        lead = (shape.L,) if shape.documents else (shape.B, shape.L)
        made = torch.randn(*lead, heads, width, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return (made if shape.documents else made.transpose(1, 2)).detach().requires_grad_()

    return [normal(shape.H, shape.d), normal(shape.H_kv, shape.d), normal(shape.H_kv, shape.d_v)]


def _ours(shape: Shape, starts: Tensor | None) -> Callable:
    if starts is not None:
        return lambda q, k, v: op.packed_attention(q, k, v, starts, starts, shape.causal)
    return lambda q, k, v: op.attention(q, k, v, causal=shape.causal, window=shape.window)


def with_flex(shape: Shape) -> bool:
    """Whether flex_attention takes part: compiling it takes seconds for every shape, so where it has something to show."""
    return shape.L == 8192 or shape.window is not None or shape.documents > 0


def contenders(shape: Shape, tensors: list[Tensor], compiled: bool, say: Callable[[str], None]) -> dict[str, Callable]:
    """Ours, and the peers that run here and agree with it."""
    device = str(tensors[0].device)
    starts = starts_of(shape, device) if shape.documents else None
    compiled = compiled and with_flex(shape)
    if starts is None:
        candidates = peers.dense_peers(shape.causal, shape.window, shape.L, device, compiled)
    else:
        candidates = peers.packed_peers(starts, shape.causal, device, compiled)
    ours = _ours(shape, starts)
    found = {"ours": ours}
    with torch.no_grad():
        wanted = ours(*tensors)
        for name, function in candidates.items():
            if function is None:
                continue
            try:
                agrees = alike(function(*tensors), wanted)
            except Exception as error:  # a peer that does not run on this machine is left out, and said to be
                say(f"{name} {shape.name}: left out ({brief(error)})")
                continue
            if agrees:
                found[name] = function
            else:
                say(f"{name} {shape.name}: left out, its results differ from ours")
    return found


def _pairs(shape: Shape, device: str) -> int:
    """Pairs of all heads and sequences."""
    if not shape.documents:
        return shape.B * shape.H * traffic.pairs(shape.L, shape.L, shape.causal, shape.window)
    lengths = starts_of(shape, device).diff().tolist()
    return shape.H * sum(traffic.pairs(n, n, shape.causal, shape.window) for n in lengths)


def _forward_call(function: Callable, tensors: list[Tensor]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return function(*tensors)

    return call


def _backward_call(function: Callable, tensors: list[Tensor], say: Callable[[str], None], name: str) -> Callable | None:
    try:
        out = function(*tensors)
        seed = torch.randn_like(out)
        torch.autograd.grad(out, tensors, seed, retain_graph=True)
    except Exception as error:
        say(f"{name}: no backward here ({brief(error)})")
        return None
    return lambda: torch.autograd.grad(out, tensors, seed, retain_graph=True)


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, compiled: bool = True) -> Iterator[Case]:
    """Every shape forward, and some backward."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    forward, backward = (shapes, shapes) if shapes else (QUICK, QUICK) if quick else (FORWARD, BACKWARD)
    for shape in dict.fromkeys((*forward, *backward)):
        found = _of_shape(shape, dtype, device, shape in backward, compiled, say)
        yield from made(found, f"attention {shape.name}")


def _of_shape(
    shape: Shape, dtype: torch.dtype, device: str, backward: bool, compiled: bool, say: Callable[[str], None]
) -> Iterator[Case]:
    tensors = operands(shape, dtype, device)
    runners = contenders(shape, tensors, compiled, say)
    sizes = (shape.B, shape.H, shape.H_kv, shape.L, shape.L, shape.d, shape.d_v, tensors[0].element_size())
    n_pairs, kind = _pairs(shape, device), str(dtype).removeprefix("torch.")
    mask = shape.name.split(" ")[0] + " packed" * (shape.documents > 0) + " grouped" * (shape.H_kv != shape.H)
    line = f"{mask} d={shape.d}"
    yield Case(
        f"forward {shape.name}", kind, traffic.forward_bytes(*sizes),
        {name: _forward_call(f, tensors) for name, f in runners.items()},
        flops=traffic.forward_flops(n_pairs, shape.d, shape.d_v), flush=False, line=f"forward {line}", size=shape.L,
    )  # fmt: skip
    if not backward:
        return
    calls = {name: _backward_call(f, tensors, say, name) for name, f in runners.items()}
    yield Case(
        f"backward {shape.name}", kind, traffic.backward_bytes(*sizes),
        {name: call for name, call in calls.items() if call is not None},
        flops=traffic.backward_flops(n_pairs, shape.d, shape.d_v), flush=False, line=f"backward {line}", size=shape.L,
    )  # fmt: skip


def _neighbours(tile: Tile) -> list[Tile]:
    """Half and double of either side, fewer and more warps and stages."""
    found = {tile}
    for name, values in (("block_m", (64, 128)), ("block_n", (32, 64, 128)), ("warps", (4, 8)), ("stages", (2, 3, 4))):
        found |= {replace(tile, **{name: value}) for value in values}
    return sorted(found, key=str)


def sweep_cases(device: str, shapes=(QUICK[0], QUICK[1])) -> Iterator[Case]:
    """The forward and both passes of the backward with the neighbours of every tile, to see whether one is better."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kind = str(dtype).removeprefix("torch.")
    for shape in shapes:
        q, k, v = (t.detach() for t in operands(shape, dtype, device))
        pattern, scale, plan = Pattern(shape.causal), shape.d**-0.5, launch.plan_of(q, v)
        o, lse = launch.forward(q, k, v, pattern, scale, None)
        n_pairs, do = _pairs(shape, device), torch.randn_like(o)
        sizes = (shape.B, shape.H, shape.H_kv, shape.L, shape.L, shape.d, shape.d_v, q.element_size())
        call = partial(launch.forward, q, k, v, pattern, scale, None)
        yield Case(
            f"forward {shape.name}", kind, traffic.forward_bytes(*sizes),
            {str(tile): partial(call, tile) for tile in _neighbours(plan.forward) if _runs(partial(call, tile))},
            flops=traffic.forward_flops(n_pairs, shape.d, shape.d_v), flush=False,
        )  # fmt: skip
        back = partial(launch.backward, do, None, q, k, v, o, lse, pattern, scale, None)
        plans = [Plan(plan.forward, tile, plan.queries) for tile in _neighbours(plan.keys)]
        plans += [Plan(plan.forward, plan.keys, tile) for tile in _neighbours(plan.queries)]
        yield Case(
            f"backward {shape.name}", kind, traffic.backward_bytes(*sizes),
            {f"{p.keys} {p.queries}": partial(back, p) for p in plans if _runs(partial(back, p))},
            flops=traffic.backward_flops(n_pairs, shape.d, shape.d_v), flush=False,
        )  # fmt: skip


def _runs(call: Callable[[], Any]) -> bool:
    """Whether a tile fits this machine at all."""
    try:
        call()
    except Exception:  # more shared memory than there is
        return False
    return True
