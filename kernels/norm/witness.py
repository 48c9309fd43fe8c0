"""Problems whose answers are known exactly: every intermediate is a small integer over a power of two.

Rows are m + c or m - c in equal numbers (m an integer of the row's own, 0 for RMSNorm), with c a power of two and eps = 0, so the root is
exactly c and the normalised row is exactly 1 or -1. Weights and cotangents are small integers. Results must then
be equal, not close: no tolerance hides a wrong lane, a lost row or a miscompiled instruction. Needs torch alone,
so that it runs on any GPU machine; `python -m kernels bench` runs it before it times anything.
"""

from collections.abc import Iterator

import torch

from kernels.norm import launch
from kernels.norm.config import BackwardPlan, Tile
from kernels.problem import mismatches

LENGTHS_GPU = (16, 128, 1024, 4096, 8192, 16_384, 65_536)
LENGTHS_TIMED = (4096, 65_536)
LENGTHS = (16, 64)
SMALL = Tile(2, 16, 1), BackwardPlan(Tile(2, 16, 1, 2), 2, Tile(1, 16, 1))  # makes 64 columns a long row


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    gpu = device != "cpu"
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if gpu else (torch.float32, torch.float16)
    for d in (LENGTHS_TIMED if short else LENGTHS_GPU) if gpu else LENGTHS:
        for dtype in dtypes[2:] if short and gpu else dtypes:
            for centred in (False, True):
                for residual in (False, True):
                    name = f"{'add ' * residual}{'layer' if centred else 'rms'} norm d={d} {dtype}"
                    if gpu or d == 16:
                        yield name, wrong(device, d, dtype, centred, residual)
                    else:
                        yield name + " in small tiles", wrong(device, d, dtype, centred, residual, *SMALL)
                        yield (
                            name + " in small tiles, strided",
                            wrong(device, d, dtype, centred, residual, *SMALL, strided=True),
                        )


def wrong(
    device: str, d: int, dtype: torch.dtype, centred: bool, residual: bool,
    tile: Tile | None = None, plan: BackwardPlan | None = None, n_rows: int = 37, strided: bool = False,
) -> int:  # fmt: skip
    """How many elements of y, s, dx, dg and db are not what they must be (d a power of two, at least 16).

    ``strided`` puts every operand into every second column of a buffer of NaN.
    """
    generator = torch.Generator().manual_seed(d)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).double()

    n_rows = n_rows if device != "cpu" else 5
    # In every 16 columns as many + as -, in any order: then the mean of every tile of a long row is exact too.
    order = torch.rand(n_rows, d // 16, 16, generator=generator).argsort(-1)  # (n_rows, d / 16, 16)
    signs = torch.where(order < 8, 1.0, -1.0).double().reshape(n_rows, d)
    size = 2.0 ** integers(-1, 1, n_rows, 1)
    mean = integers(-3, 3, n_rows, 1) if centred else 0.0
    s = signs * size + mean
    r = integers(-2, 2, n_rows, d) if residual else None
    g, b = integers(1, 2, d), integers(-2, 2, d)
    dy, ds = integers(-2, 2, n_rows, d), integers(-2, 2, n_rows, d)

    def on_device(t: torch.Tensor) -> torch.Tensor:
        made = t.to(torch.float32).to(dtype).to(device)
        if not strided:
            return made
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=dtype, device=device)
        wide[..., ::2] = made
        return wide[..., ::2]

    x = s if r is None else s - r
    shift = on_device(b) if centred else None
    y, total, mean_row, rho = launch.forward(
        on_device(x), None if r is None else on_device(r), on_device(g), shift, 0.0, centred, tile
    )
    arriving = None if r is None else on_device(ds)
    rows = on_device(x) if total is None else total
    dx, dg, db = launch.backward(
        on_device(dy), arriving, rows, on_device(g), mean_row, rho, dtype if centred else None, plan
    )
    g_hat = dy * g
    exact_dx = (g_hat - signs * (g_hat * signs).mean(1, keepdim=True) - centred * g_hat.mean(1, keepdim=True)) / size
    pairs = [
        (y, signs * g + (b if centred else 0.0)),
        (dx, exact_dx + (ds if residual else 0.0)),
        (dg, (dy * signs).sum(0)),
    ]
    if total is not None:
        pairs.append((total, s))
    if db is not None:
        pairs.append((db, dy.sum(0)))
    return sum(mismatches(found + 0.0, on_device(exact) + 0.0) for found, exact in pairs)
