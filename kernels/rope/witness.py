"""Rotations with exact answers: quarter turns, whose cosines and sines are 0, 1 and -1."""

from collections.abc import Iterator

import torch

from kernels.problem import mismatches
from kernels.rope import launch

WIDTHS = (2, 24, 64)
WIDTHS_GPU = (*WIDTHS, 80, 128, 256)


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    gpu = device != "cpu"
    dtypes = (torch.float32, torch.float16, *([torch.bfloat16] if gpu else []))
    for d in WIDTHS_GPU[2 if short else 0 :] if gpu else WIDTHS:
        for dtype in dtypes[2:] if short and gpu else dtypes:
            for pairing in ("interleaved", "half"):
                yield f"{pairing} d_head={d} {dtype}", wrong(device, d, dtype, pairing)


def wrong(device: str, d: int, dtype: torch.dtype, pairing: str, length: int = 11) -> int:
    """How many elements are not what they must be, turned there and back."""
    generator = torch.Generator().manual_seed(d)
    quarter = (torch.arange(length + 2)[:, None] * torch.arange(1, d // 2 + 1)) % 4  # quarter turns
    cos, sin = (torch.tensor(v, dtype=torch.float32)[quarter].to(device) for v in ([1, 0, -1, 0], [0, 1, 0, -1]))
    x = torch.randint(-8, 9, (2, 3, length, d), generator=generator).to(dtype).to(device)
    a, b = (x[..., ::2], x[..., 1::2]) if pairing == "interleaved" else x.chunk(2, -1)
    c, s = cos[2:].to(dtype), sin[2:].to(dtype)
    turned = a * c - b * s, b * c + a * s
    exact = torch.stack(turned, -1).reshape(x.shape) if pairing == "interleaved" else torch.cat(turned, -1)
    y = launch.turn(x, cos, sin, None, 2, pairing)
    back = launch.turn(y, cos, sin, None, 2, pairing, backward=True)
    return mismatches(y + 0.0, exact + 0.0) + mismatches(back + 0.0, x + 0.0)
