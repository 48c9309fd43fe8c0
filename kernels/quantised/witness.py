"""Products with exact answers: codes at 0 and at both ends, where levels are 0, -1 and 1, and scales that are powers of two."""

from collections.abc import Iterator

import torch

from kernels.problem import mismatches
from kernels.quantised import launch
from kernels.quantised.config import Tile
from kernels.quantised.launch import FORMATS, Weight

SHAPES = ((33, 64), (17, 31))  # n, k; the last with blocks over the ends of rows
SHAPES_GPU = (*SHAPES, (768, 768), (4096, 1024), (1000, 257))
SMALL = Tile(16, 16, 16, 1)
LEVEL = {-1: 0, 0: 7, 1: 15}  # the codes of these levels


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    gpu = device != "cpu"
    dtypes = (torch.float32, torch.float16, *([torch.bfloat16] if gpu else []))
    for n, k in SHAPES_GPU[3 if short else 0 :] if gpu else SHAPES:
        for dtype in dtypes[2:] if short and gpu else dtypes:
            for kind in FORMATS:
                for rows in (5, 130) if gpu else (5, 17):
                    name = f"{kind} {rows}x{k} by {n} {dtype}"
                    yield name, wrong(device, kind, rows, n, k, dtype)
                    if not gpu and rows == 17:
                        yield name + " in small tiles", wrong(device, kind, rows, n, k, dtype, SMALL)


def weight_of(kind: str, signs: torch.Tensor) -> Weight:
    """W of -2, 0 and 2 in a format: every scale is 2."""
    n, k = signs.shape
    device, flat = signs.device, signs.reshape(-1).long()
    if kind == "int8":
        return Weight(kind, signs.to(torch.int8), torch.full((n, 1), 2.0, device=device), None, 0.0, n, k)
    codes = torch.tensor(list(LEVEL.values()), dtype=torch.uint8, device=device)[flat + 1]
    codes = torch.nn.functional.pad(codes, (0, n * k % 2))
    packed = (codes[::2] << 4) | codes[1::2]
    blocks = -(-n * k // 64)
    if kind == "nf4":
        return Weight(kind, packed, torch.full((blocks,), 2.0, device=device), None, 0.0, n, k)
    rows = -(-blocks // 256)
    meta = torch.full((rows, 1), 0.25, device=device)  # 0.25 * 6 + 0.5 = 2
    return Weight(kind, packed, torch.full((rows, 256), 6, dtype=torch.int8, device=device), meta, 0.5, n, k)


def wrong(device: str, kind: str, rows: int, n: int, k: int, dtype: torch.dtype, tile: Tile | None = None) -> int:
    """How many elements of y and dx are not what they must be; few numbers in x are not 0, so that sums stay exact."""
    generator = torch.Generator().manual_seed(n + k)

    def drawn(*shape: int) -> torch.Tensor:
        kept = torch.rand(shape, generator=generator) < min(1.0, 60 / shape[-1])
        return (torch.randint(-2, 3, shape, generator=generator) * kept).to(device, dtype)

    signs = torch.randint(-1, 2, (n, k), generator=generator).to(device)
    weight, w = weight_of(kind, signs), 2 * signs.double()
    x, dy = drawn(rows, k), drawn(rows, n)
    pairs = ((launch.product(x, weight, tile=tile), x.double() @ w.t()),
             (launch.product(dy, weight, True, tile), dy.double() @ w))  # fmt: skip
    return sum(mismatches(found + 0.0, exact.to(dtype) + 0.0) for found, exact in pairs)
