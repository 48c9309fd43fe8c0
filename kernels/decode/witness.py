"""Problems whose answers are known exactly: every row attends to 1, 2, 4 or 8 keys equally, and to no other at all.

Queries pick one column of the keys, which holds 0 for the chosen keys and -16 for all others: times 64 that is a score of
-1024, whose exponential is exactly 0. The chosen keys of a column lie within 16 neighbours, so in one split; the other
splits come out with a log-sum-exp near -1024 and weigh exactly 0. Values are small integers, so their mean has to be
*equal* to the output: no tolerance hides a lost key, a wrong column or a miscompiled instruction. Needs torch alone.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from kernels.decode import launch
from kernels.decode.config import Plan, plan_for
from kernels.problem import mismatches

FORMS = ("plain", "window, cap", "paged", "latent")
SMALL = Plan(16, 16, 3, 1, 2, 2)
# B, H_kv, group, L_q, capacity, d, d_v
SHAPES = ((2, 2, 3, 2, 64, 24, 16), (1, 1, 20, 1, 33, 40, 24))
SHAPES_GPU = (
    (8, 8, 1, 1, 4096, 128, 128), (3, 2, 8, 1, 5000, 128, 128), (2, 2, 8, 4, 4096, 128, 128), (2, 4, 4, 1, 3000, 64, 64),
    (2, 2, 1, 1, 4096, 192, 128), (2, 2, 2, 1, 1000, 80, 80), (1, 2, 8, 1, 2048, 256, 256), *SHAPES,
)  # fmt: skip
LATENT_GPU = ((4, 1, 16, 1, 4096, 576, 512), (2, 1, 128, 1, 4096, 576, 512))


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    gpu = device != "cpu"
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if gpu else (torch.float32, torch.float16)
    for dtype in dtypes[2:] if short and gpu else dtypes:
        for form in FORMS:
            yield from of_form(device, dtype, form, short)


def of_form(device: str, dtype: torch.dtype, form: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The exact problems of one dtype and form of cache."""
    gpu = device != "cpu"
    for shape in _shapes(form, gpu, short):
        for plan in (None, SMALL) if not gpu else (None,) if short else (None, "three splits"):
            name = f"{form} {shape} {dtype} {'own plan' if plan is None else 'three splits'}"
            yield name, wrong(device, shape, dtype, form, plan)


def _shapes(form: str, gpu: bool, short: bool) -> tuple[tuple[int, ...], ...]:
    if not gpu:
        return SHAPES
    if form == "latent":
        return LATENT_GPU if short else LATENT_GPU + SHAPES[1:]
    return SHAPES_GPU[1:4] if short else SHAPES_GPU


def wrong(device: str, shape: tuple[int, ...], dtype: torch.dtype, form: str, plan: Plan | str | None = None) -> int:
    """How many elements of o and lse are not what they must be."""
    B, H_kv, group, L_q, capacity, d, d_v = shape
    latent = form == "latent"
    H_kv, d_v = (1, min(d, d_v)) if latent else (H_kv, d_v)
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high + 1, size, generator=generator)

    # Lengths leave room for the window of 16 before the newest tokens.
    lengths = draw(16 + L_q, capacity, B) if capacity > 16 + L_q else torch.full((B,), capacity)
    window = 48 + L_q if form == "window, cap" else None
    k = torch.full((B, H_kv, capacity, d), -16.0, dtype=torch.float64)
    v = draw(-4, 4, B, H_kv, capacity, d_v).double()
    chosen = torch.zeros(B, H_kv, capacity, d, dtype=torch.bool)
    log_count = draw(0, 3, B, H_kv, d)
    for b in range(B):
        last = (int(lengths[b]) - L_q) // 16 * 16 - 16  # the last block of 16 that every new token sees
        first = 0 if window is None else max(int(lengths[b]) - window + 15, 0) // 16 * 16
        for h in range(H_kv):
            for c in range(d):
                block = 16 * int(draw(first // 16, max(last, first) // 16, 1))
                order = torch.randperm(16, generator=generator)[: 1 << int(log_count[b, h, c])]
                chosen[b, h, block + order, c] = True
    k[chosen] = 0.0
    values = k[..., :d_v] if latent else v
    column = draw(0, d - 1, B, H_kv, group * L_q)
    q = torch.zeros(B, H_kv, group * L_q, d, dtype=torch.float64)
    q.scatter_(-1, column[..., None], 64.0)
    weights = chosen.double().transpose(-1, -2).gather(2, column[..., None].expand(-1, -1, -1, capacity))
    count = weights.sum(-1, keepdim=True)
    o = (weights @ values / count).reshape(B, H_kv * group, L_q, d_v)
    lse = (count.log2().float() * torch.tensor(math.log(2.0), dtype=torch.float32)).reshape(B, H_kv * group, L_q)

    def on_device(t: torch.Tensor) -> torch.Tensor:
        return t.to(torch.float32).to(dtype).to(device)

    table = None
    q, k, v = on_device(q.reshape(B, H_kv * group, L_q, d)), on_device(k), on_device(v)
    for b in range(B):  # what lies behind a length
        k[b, :, lengths[b] :] = v[b, :, lengths[b] :] = float("nan")
    if form == "paged":
        k, v, table = _paged(k, v, generator)
    if latent:
        v = k[..., :d_v]
    if plan == "three splits":
        own = plan_for(
            B * H_kv, group * L_q, capacity, d, d_v, k.element_size(), 1, latent, table is not None,
            torch.version.hip is not None,
        )  # fmt: skip
        plan = replace(own, splits=3)
    found, found_lse = launch.decode(
        q, k, v, lengths.to(device), table, 1.0, window, 4096.0 if window else None, latent, None,
        plan if isinstance(plan, Plan) else None,
    )  # fmt: skip
    return mismatches(found + 0.0, on_device(o) + 0.0) + mismatches(found_lse + 0.0, lse.to(device) + 0.0)


def _paged(k: torch.Tensor, v: torch.Tensor, generator: torch.Generator, page: int = 16) -> tuple[torch.Tensor, ...]:
    """The same cache in shuffled pages, NaN where there was nothing, and the table that finds them."""
    B, H_kv, capacity, _ = k.shape
    n = -(-capacity // page)
    where = torch.randperm(B * n, generator=generator).reshape(B, n)

    def pages(x: torch.Tensor) -> torch.Tensor:
        full = torch.full((B, H_kv, n * page, x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
        full[:, :, :capacity] = x
        cut = full.reshape(B, H_kv, n, page, x.shape[-1]).permute(0, 2, 1, 3, 4)  # (B, n, H_kv, page, d)
        placed = torch.empty((B * n, H_kv, page, x.shape[-1]), dtype=x.dtype, device=x.device)
        placed[where.reshape(-1).to(x.device)] = cut.reshape(B * n, H_kv, page, x.shape[-1])
        return placed

    return pages(k), pages(v), where.to(torch.int32).to(k.device)
