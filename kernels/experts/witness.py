"""Problems whose answers are known exactly: small integers, of which every sum and product is representable.

The SwiGLU is made exact by its gate: a column of W_in that answers with 0 gives sigmoid 1/2 and SiLU 0, and one that
answers with 128 or more gives SiLU(g) = g in float32. So gates are 128 or 0, values small, and the layer's output is
an integer. Numbers of the packing are integers anyway. Results must be equal, not close. Needs torch alone; `python -m
kernels bench` runs it before it times anything.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.experts import launch, launch_routing
from kernels.experts.config import Plan, Tile
from kernels.problem import mismatches

SIZES = ((37, 5, 2, 48, 32), (64, 3, 3, 33, 17))  # N, E, k, d, d_ff
SIZES_GPU = (
    *SIZES,
    (4096, 8, 2, 512, 256),
    (8192, 128, 8, 2048, 768),
    (70_000, 4, 1, 64, 64),
    (300, 512, 10, 256, 128),
)
SIZES_TIMED = ((4096, 8, 2, 512, 256), (8192, 128, 8, 2048, 768))
SMALL = Tile(16, 16, 16, 1, 1, 2)
IN_SMALL_TILES = Plan(SMALL, SMALL, SMALL)


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    gpu = device != "cpu"
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if gpu else (torch.float32, torch.float16)
    for sizes in (SIZES_TIMED if short else SIZES_GPU) if gpu else SIZES:
        for capacity in (None, max(sizes[0] * sizes[2] // sizes[1] // 2, 1)):
            yield f"packing {sizes} capacity={capacity}", wrong_packing(device, *sizes[:3], capacity)
        for dtype in dtypes[2:] if short and gpu else dtypes:
            yield f"products {sizes} {dtype}", wrong_products(device, *sizes, dtype)
            yield f"layer {sizes} {dtype}", wrong_layer(device, *sizes, dtype)
        if not gpu and sizes == SIZES[0]:
            yield f"products {sizes} in small tiles", wrong_products(device, *sizes, torch.float32, IN_SMALL_TILES)
            yield f"layer {sizes} in small tiles", wrong_layer(device, *sizes, torch.float32, IN_SMALL_TILES)


def _generator(*sizes: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(sizes))


def _choice(N: int, E: int, k: int) -> Tensor:
    """k different experts a token; the last expert gets nobody unless all are needed, the first gets many."""
    scores = torch.rand(N, E, generator=_generator(N, E, k))
    scores[:, 0] += 0.5
    if k < E:
        scores[:, -1] = -1.0
    return scores.topk(k, dim=1).indices.int()


def _integers(
    device: str, sizes: tuple[int, ...], low: int, high: int, shape: tuple[int, ...], share: float = 1.0
) -> Tensor:
    """Integers in low..high as float64, all but a share of them 0 so that long sums stay small.

    On the device, as the exact answers are: the largest sizes would keep a host busy for minutes.
    """
    generator = torch.Generator(device).manual_seed(sum(sizes) + sum(shape))
    found = torch.randint(low, high + 1, shape, generator=generator, device=device).double()
    return found * (torch.rand(shape, generator=generator, device=device) < share)


def wrong_packing(device: str, N: int, E: int, k: int, capacity: int | None) -> int:
    """How many numbers of order, places and offsets differ from those of a stable sort on the host."""
    experts = _choice(N, E, k)
    flat = experts.reshape(-1).long()
    sort = torch.sort(flat, stable=True).indices
    loads = torch.bincount(flat, minlength=E)
    first = torch.cumsum(loads, 0) - loads
    rank = torch.empty_like(flat)
    rank[sort] = torch.arange(N * k) - first[flat[sort]]
    kept = loads if capacity is None else loads.clamp(max=capacity)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.cumsum(kept, 0)])
    served = rank < kept[flat]
    places = torch.where(served, offsets[flat] + rank, -1)
    order = torch.full((N * k,), -1)
    order[places[served]] = torch.nonzero(served)[:, 0]
    found = launch_routing.pack(experts.to(device), E, capacity)
    wanted = (order.int(), places.int().reshape(N, k), offsets.int())
    return sum(mismatches(a.cpu(), b) for a, b in zip(found, wanted))


def wrong_products(
    device: str, N: int, E: int, k: int, d: int, d_ff: int, dtype: torch.dtype, plan: Plan | None = None
) -> int:
    """How many elements of a grouped product and of its two gradients are not the exact ones."""
    sizes = N, E, k, d, d_ff
    _, _, offsets = launch_routing.pack(_choice(N, E, k).to(device), E, None)
    A = N * k
    share = min(16 / max(d, d_ff), 1.0)
    x, w = _integers(device, sizes, -2, 2, (A, d), share), _integers(device, sizes, -2, 2, (E, d_ff, d), share)
    dy = _integers(device, sizes, -1, 1, (A, d_ff), min(16 / max(d_ff, A // E), 1.0))
    bounds = offsets.tolist()
    groups = list(zip(bounds, bounds[1:]))
    y = torch.cat([x[a:b] @ w[e].T for e, (a, b) in enumerate(groups)])
    dx = torch.cat([dy[a:b] @ w[e] for e, (a, b) in enumerate(groups)])
    dw = torch.stack([dy[a:b].T @ x[a:b] for a, b in groups])
    there = [t.to(torch.float32).to(dtype) for t in (x, w, dy)]
    found = [launch.grouped_linear(there[0], there[1], offsets, plan)]
    found += launch.grouped_linear_backward(there[2], there[0], there[1], offsets, plan)
    return sum(_wrong(a, b) for a, b in zip(found, (y, dx, dw)))


def wrong_layer(
    device: str, N: int, E: int, k: int, d: int, d_ff: int, dtype: torch.dtype, plan: Plan | None = None
) -> int:
    """How many elements of the layer's output are not the exact ones; the first column of x decides every gate."""
    sizes = N, E, k, d, d_ff
    experts = _choice(N, E, k).to(device)
    x = _integers(device, sizes, -1, 1, (N, d), min(8 / d, 1.0))
    x[:, 0] = 1.0
    w_in = _integers(device, sizes, -1, 1, (E, 2 * d_ff, d), min(8 / d, 1.0))
    w_in[:, d_ff:] = 0.0
    w_in[:, d_ff:, 0] = 128 * (torch.rand((E, d_ff), generator=_generator(*sizes)) < 8 / d_ff).to(device)
    w_down = _integers(device, sizes, -1, 1, (E, d, d_ff), min(8 / d_ff, 1.0))
    gates = 2.0 ** _integers(device, sizes, -2, 0, (N, k))
    exact = torch.zeros(N, d, dtype=torch.float64, device=device)
    for slot in range(k):
        for e in range(E):
            hit = experts[:, slot] == e
            h = x[hit] @ w_in[e].T
            exact[hit] += gates[hit, slot, None] * ((h[:, :d_ff] * h[:, d_ff:]) @ w_down[e].T)
    there = [t.to(torch.float32).to(dtype) for t in (x, w_in, w_down)]
    z, _ = launch.layer(there[0], gates.float(), there[1], there[2], experts, None, chosen=plan)
    return _wrong(z, exact)


def _wrong(found: Tensor, exact: Tensor) -> int:
    """Differences where the exact number has a place in the dtype."""
    wanted = exact.to(torch.float32).to(found.dtype)
    there = wanted.double() == exact
    return mismatches((found + 0.0)[there], (wanted + 0.0)[there])
