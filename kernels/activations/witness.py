"""Gated units with exact answers: gates at 0, where the slope is 1/2, and far out, where it is 0 or 1."""

from collections.abc import Iterator

import torch

from kernels.activations import launch
from kernels.problem import mismatches

WIDTHS = (1, 16, 33)
WIDTHS_GPU = (*WIDTHS, 768, 4096, 14_336)


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    gpu = device != "cpu"
    dtypes = (torch.float32, torch.float16, *([torch.bfloat16] if gpu else []))
    for d in WIDTHS_GPU[3 if short else 0 :] if gpu else WIDTHS:
        for dtype in dtypes[2:] if short and gpu else dtypes:
            for silu in (True, False):
                yield f"{'swiglu' if silu else 'geglu'} d_ff={d} {dtype}", wrong(device, d, dtype, silu)


def wrong(device: str, d: int, dtype: torch.dtype, silu: bool, n_rows: int = 37) -> int:
    """How many elements of y, dvalue and dgate are not what they must be."""
    generator = torch.Generator().manual_seed(d)

    def drawn(*of: float) -> torch.Tensor:
        return torch.tensor(of)[torch.randint(len(of), (n_rows, d), generator=generator)].to(dtype).to(device)

    value, gate, dy = drawn(-2, -1, 0, 1, 2), drawn(-256, 0, 256), drawn(-2, -1, 0, 1, 2)
    into = torch.empty_like(value), torch.empty_like(gate)
    launch.backward(dy, value, gate, into, silu)
    open_gate = torch.where(gate > 0, 1.0, 0.0).to(dtype)
    slope = torch.where(gate == 0, 0.5, open_gate).to(dtype)
    pairs = [
        (launch.forward(value, gate, silu), value * gate * open_gate),
        (into[0], dy * gate * open_gate),
        (into[1], dy * value * slope),
    ]
    return sum(mismatches(found + 0.0, exact + 0.0) for found, exact in pairs)
