"""What is timed for the experts: products, the layer, and everything around the products, beside their peers."""

# What a star unpacks may be of any length to a type checker: it does not count arguments behind one.
# pyright: reportCallIssue=false

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contenders import Case, alike, brief, made, prepared
from kernels.experts import launch, launch_routing, op, traffic
from kernels.experts.config import Tile
from minillm.checks import MissingPackageError, optional_import

# N, E, k, d_model, d_ff
SHAPES = ((32_768, 128, 8, 2048, 768), (8192, 128, 8, 2048, 768), (32_768, 8, 2, 4096, 14_336))
QUICK_SHAPES = SHAPES[:1]
SMALLEST_SHAPES = ((8, 4, 2, 16, 16),)  # for trying the machinery out
ZIPF = "Zipf"


def _normal(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(len(shape))
    return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)


def _logits(device: str, N: int, E: int, skew: bool) -> Tensor:
    """Router logits of random preferences, or of popularities that fall like 1 / rank."""
    logits = _normal(device, torch.float32, N, E)
    return logits - torch.log1p(torch.arange(E, device=device, dtype=torch.float32)) if skew else logits


def _grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return torch._grouped_mm(x, w.transpose(1, 2), offs=offsets[1:])  # type: ignore[reportPrivateImportUsage]


def _loop(x: Tensor, w: Tensor, bounds: list[int]) -> Tensor:
    return torch.cat([x[a:b] @ w[e].T for e, (a, b) in enumerate(zip(bounds, bounds[1:]))])


def _layer_of_torch(product: Callable[..., Tensor], x: Tensor, gates: Tensor, w_in: Tensor, w_down: Tensor,
                    experts: Tensor) -> Tensor:  # fmt: skip
    """The layer around somebody else's grouped product: sort, gather, products, scatter-add."""
    k, E = experts.shape[1], len(w_in)
    order = torch.argsort(experts.reshape(-1), stable=True)
    offsets = torch.cumsum(torch.bincount(experts.reshape(-1), minlength=E), 0).int()
    offsets = torch.cat([offsets.new_zeros(1), offsets])
    value, gate = product(x[order // k], w_in, offsets).chunk(2, -1)
    y = product(value * F.silu(gate), w_down, offsets) * gates.reshape(-1)[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // k, y)


def _liger() -> Callable[..., Tensor] | None:
    try:
        found = optional_import("liger_kernel.ops.fused_moe", "dev").LigerFusedMoEFunction.apply
    except (MissingPackageError, AttributeError):
        return None

    def call(x: Tensor, gates: Tensor, w_in: Tensor, w_down: Tensor, experts: Tensor) -> Tensor:
        value, gate = w_in.chunk(2, 1)  # its projection is [gate; value]
        return found(x, torch.cat([gate, value], 1), w_down, experts, gates.to(x.dtype))

    return call


def _agreeing(
    ours: Callable[[], Any], peers: Mapping[str, Callable[[], Any] | None], say: Callable[[str], None], name: str
) -> dict[str, Callable[[], Any]]:
    """The peers that run here and compute the same thing; nothing else is timed beside ours."""
    found = {}
    for peer, call in peers.items():
        if call is None:
            continue
        try:
            with torch.no_grad():
                agrees = alike(call(), ours())
        except Exception as error:  # a peer that does not run on this machine is left out, and said to be
            say(f"{peer} {name}: left out ({brief(error)})")
            continue
        if agrees:
            found[peer] = call
        else:
            say(f"{peer} {name}: left out, its results differ from ours")
    return found


def _quietly(call: Callable[[], Any]) -> Callable[[], Any]:
    def run():
        with torch.no_grad():
            return call()

    return run


def _pull(function: Callable[..., Tensor], operands: list[Tensor], *rest: Any) -> Callable[[], Any]:
    y = function(*operands, *rest)
    seed = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, operands, seed, retain_graph=True)


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, compiled: bool = True) -> Iterator[Case]:
    """Products, routing with all that surrounds them, and the layer, forward and backward, even and skewed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for sizes in shapes or (QUICK_SHAPES if quick else SHAPES):
        for skew in (False, True):
            name = f"N={sizes[0]} E={sizes[1]} k={sizes[2]} d={sizes[3]} d_ff={sizes[4]}" + f" {ZIPF}" * skew
            yield from made(_layer(device, dtype, *sizes, name, skew, say), f"layer {name}")
            yield from made(_product(device, dtype, *sizes, name, skew, say), f"grouped product {name}")
            yield from made(_around(device, dtype, *sizes, name, skew), f"around the products {name}")


def _around(device, dtype, N, E, k, d, d_ff, name: str, skew: bool) -> Iterator[Case]:
    """Routing, packing and combining: what a layer does beside its products, as a fraction of the copy rate."""
    size, kind = dtype.itemsize, str(dtype).removeprefix("torch.")
    logits = _logits(device, N, E, skew).to(dtype)
    gates, experts, *_ = launch_routing.route(logits, None, k, False, True)
    _, places, _ = launch_routing.pack(experts, E, None)
    y = _normal(device, dtype, N * k, d)

    def everything():
        gates, experts, *_ = launch_routing.route(logits, None, k, False, True)
        _, places, offsets = launch_routing.pack(experts, E, None)
        launch_routing.tiles(offsets, N * k, 128)
        return launch.combine(y, places, gates)

    def torch_topk():
        top, chosen = torch.topk(torch.softmax(logits.float(), -1), k)
        return top / top.sum(-1, keepdim=True), chosen

    bytes_of = traffic.route_bytes(N, k, E, size), traffic.pack_bytes(N, k, E), traffic.combine_bytes(N, k, d, size)
    yield Case(f"route {name}", kind, bytes_of[0], {
        "ours": partial(launch_routing.route, logits, None, k, False, True), "torch": torch_topk,
    })  # fmt: skip
    yield Case(f"pack {name}", kind, bytes_of[1], {
        "ours": partial(launch_routing.pack, experts, E, None),
        "torch": lambda: (torch.sort(experts.reshape(-1), stable=True), torch.bincount(experts.reshape(-1), minlength=E)),
    })  # fmt: skip
    yield Case(f"combine {name}", kind, bytes_of[2], {
        "ours": partial(launch.combine, y, places, gates),
        "torch": lambda: (y[places.long()] * gates[..., None].to(dtype)).sum(1),
    })  # fmt: skip
    yield Case(f"route, pack and combine {name}", kind, sum(bytes_of), {"ours": everything})


def _product(device, dtype, N, E, k, d, d_ff, name: str, skew: bool, say) -> Iterator[Case]:
    """The grouped product alone, beside torch's and a loop over the experts."""
    _, experts, *_ = launch_routing.route(_logits(device, N, E, skew), None, k, False, True)
    _, _, offsets = launch_routing.pack(experts, E, None)
    x, w = _normal(device, dtype, N * k, d), _normal(device, dtype, E, 2 * d_ff, d, scale=d**-0.5)
    bounds = offsets.tolist()
    ours = partial(op.grouped_linear, x, w, offsets)
    peers = {"torch._grouped_mm": partial(_grouped_mm, x, w, offsets), "loop": partial(_loop, x, w, bounds)}
    flops = traffic.product_flops(N * k, d, 2 * d_ff)
    moved = traffic.product_bytes(N * k, d, 2 * d_ff, E, dtype.itemsize)
    found = _agreeing(ours, peers, say, name)
    yield Case(f"grouped product {name}", str(dtype).removeprefix("torch."), moved,
               {n: _quietly(c) for n, c in {"ours": ours, **found}.items()}, flops, flush=False,
               line=f"grouped product E={E}{f' {ZIPF}' * skew}", size=N)  # fmt: skip


def _layer(device, dtype, N, E, k, d, d_ff, name: str, skew: bool, say) -> Iterator[Case]:
    """The layer behind the router, forward and backward."""
    gates, experts, *_ = launch_routing.route(_logits(device, N, E, skew), None, k, False, True)
    operands = [
        _normal(device, dtype, N, d), gates,
        _normal(device, dtype, E, 2 * d_ff, d, scale=d**-0.5), _normal(device, dtype, E, d, d_ff, scale=d_ff**-0.5),
    ]  # fmt: skip
    operands = [t.requires_grad_() for t in operands]
    functions = {"torch._grouped_mm": partial(_layer_of_torch, _grouped_mm), "liger": _liger()}
    ours = partial(op.mixture_of_experts, *operands, experts)
    calls = {peer: partial(f, *operands, experts) if f else None for peer, f in functions.items()}
    found = _agreeing(ours, calls, say, name)
    flops, moved = traffic.layer_flops(N * k, d, d_ff), traffic.layer_bytes(N, k, E, d, d_ff, dtype.itemsize)
    kind = str(dtype).removeprefix("torch.")
    yield Case(
        f"layer forward {name}",
        kind,
        moved,
        {n: _quietly(c) for n, c in {"ours": ours, **found}.items()},
        flops,
        flush=False,
        line=f"layer forward E={E}{f' {ZIPF}' * skew}",
        size=N,
    )
    backward = {"ours": op.mixture_of_experts, **{peer: f for peer, f in functions.items() if peer in found and f}}
    yield Case(f"layer backward {name}", kind, 2 * moved,
               prepared({n: partial(_pull, f, operands, experts) for n, f in backward.items()}, say, name), 2 * flops,
               flush=False, line=f"layer backward E={E}{f' {ZIPF}' * skew}", size=N)  # fmt: skip


def sweep_cases(device: str, shapes=SHAPES[:2]) -> Iterator[Case]:
    """The grouped product forward, and with both gradients, with the neighbours of the tile for rows and of that for weights."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for N, E, k, d, d_ff in shapes:
        _, experts, *_ = launch_routing.route(_logits(device, N, E, False), None, k, False, True)
        _, _, offsets = launch_routing.pack(experts, E, None)
        x, w = _normal(device, dtype, N * k, d), _normal(device, dtype, E, d_ff, d, scale=d**-0.5)
        dy, own = _normal(device, dtype, N * k, d_ff), launch.plan_for(N * k, E, x)
        kind, flops = str(dtype).removeprefix("torch."), traffic.product_flops(N * k, d, d_ff)
        moved = traffic.product_bytes(N * k, d, d_ff, E, dtype.itemsize)
        rows = {
            str(t): partial(launch.grouped_linear, x, w, offsets, replace(own, down=t)) for t in _around_tile(own.down)
        }
        yield Case(f"grouped product N={N} E={E}", kind, moved, rows, flops, flush=False)
        pull = partial(launch.grouped_linear_backward, dy, x, w, offsets)
        both = {str(t): partial(pull, replace(own, weights=t)) for t in _around_tile(own.weights)}
        yield Case(f"its gradients N={N} E={E}", kind, 2 * moved, both, 2 * flops, flush=False)


def _around_tile(tile: Tile) -> list[Tile]:
    """Half and double of each side and of the warps, one step more or less under way."""
    found = {tile}
    for name in ("block_m", "block_n", "block_k", "warps"):
        value = getattr(tile, name)
        found |= {replace(tile, **{name: v}) for v in (value // 2, value * 2) if v >= (1 if name == "warps" else 16)}
    found |= {replace(tile, stages=s) for s in (tile.stages - 1, tile.stages + 1) if s >= 1}
    return sorted(found, key=str)
