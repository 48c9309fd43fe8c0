r"""Problems whose answers are known exactly: every probability is 0, 1/2 or 1, and everything else a small integer.

Keys carry the bits of their number (halved, so that keys 2n and 2n + 1 are alike) as 1 and -1, and a query carries the bits
of a key that it sees, with one more column that brings the best score to 0. Any other pair of keys scores
lower by at least 2^8 in units of log 2, and 2^-256 is 0 in fp32. So a query's probabilities are 1, or 1/2 and 1/2, exactly;
outputs are halves, gradients of the scores quarters. The scale is 2^5 log 2, which times $\log_2e$ is 32 in fp32 too.
Results must then be equal, not close: no tolerance hides a wrong lane, a lost tile or a miscompiled instruction.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.attention import launch
from kernels.attention.config import Plan, Tile
from kernels.attention.launch import BOTTOM_RIGHT, TOP_LEFT, Pattern
from kernels.problem import mismatches

SCALE = 32 * math.log(2.0)
SMALL = Plan(Tile(16, 16, 1, 1), Tile(16, 16, 1, 1), Tile(16, 16, 1, 1))
WIDTHS_GPU = ((64, 64), (128, 128), (256, 256), (96, 96), (192, 128), (40, 24))
WIDTHS_TIMED = WIDTHS_GPU[:3]
LENGTHS = ((512, 512), (300, 777))  # of queries and keys, on a GPU
MASKS = ("full", "causal", "window", "prefix", "padding", "packed")


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    if device == "cpu":
        for mask in MASKS:
            for dtype in (torch.float32,) if mask != "causal" else (torch.float32, torch.float16):
                yield f"{mask} 24/16 {dtype} in small tiles", wrong(device, mask, 24, 16, dtype, (20, 37), 2, SMALL)
        return
    for d, d_v in WIDTHS_TIMED if short else WIDTHS_GPU:
        for dtype in (torch.bfloat16,) if short else (torch.float32, torch.float16, torch.bfloat16):
            yield from of_kind(device, dtype, d, d_v, MASKS[:2] if short else MASKS, LENGTHS[: 1 if short else None])


def of_kind(
    device: str, dtype: torch.dtype, d: int, d_v: int, masks: tuple[str, ...] = MASKS[:2], lengths=((512, 512),)
) -> Iterator[tuple[str, int]]:
    """The exact problems of one dtype and pair of head widths on a GPU, by default what a first call can wait for."""
    for mask in masks:
        for pair in lengths:
            yield f"{mask} {d}/{d_v} {dtype} {pair}", wrong(device, mask, d, d_v, dtype, pair, 4)


def wrong(
    device: str, mask: str, d: int, d_v: int, dtype: torch.dtype, lengths: tuple[int, int], H: int, plan: Plan | None = None
) -> int:  # fmt: skip
    """How many elements of o, dq, dk and dv are not what they must be, for H query heads on two key/value heads."""
    generator = torch.Generator().manual_seed(d)
    L_q, L_k = lengths
    pattern, keep = _pattern(mask, L_q, L_k, device)
    q, k, v, do = _operands(generator, keep, d, d_v, H)
    truth = _exact(q, k, v, do, keep)
    q, k, v, do = (t.float().to(dtype).to(device) for t in (q, k, v, do))
    o, lse = launch.forward(q, k, v, pattern, SCALE, None, plan and plan.forward)
    found = [o, *launch.backward(do, None, q, k, v, o, lse, pattern, SCALE, None, plan)]
    scaled = [
        truth[0].float(),
        *(t.float() * torch.tensor(SCALE, dtype=torch.float32) for t in truth[1:3]),
        truth[3].float(),
    ]
    return sum(mismatches(a + 0.0, b.to(dtype).to(device) + 0.0) for a, b in zip(found, scaled))


def _pattern(mask: str, L_q: int, L_k: int, device: str) -> tuple[Pattern, Tensor]:
    """A mask, and the same as a matrix (L_q, L_k)."""
    i, j = torch.arange(L_q)[:, None], torch.arange(L_k)[None, :]
    offset = L_k - L_q

    def numbers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    if mask == "causal":
        return Pattern(True), j <= i + offset
    if mask == "window":
        return Pattern(True, 19, TOP_LEFT), (j <= i) & (j > i - 19)
    if mask == "prefix":
        return Pattern(True, 0, TOP_LEFT, prefix=numbers(18)), (j <= i) | (j < 18)
    if mask == "padding":
        return Pattern(key_lengths=numbers(L_k - 5)), (j < L_k - 5).expand(L_q, L_k)
    if mask == "packed":
        cuts_q, cuts_k = (0, 7, 7, L_q // 2, L_q - 1), (0, 9, 9, L_k // 2, L_k - 2)
        keep = torch.zeros(L_q, L_k, dtype=torch.bool)
        for n in range(len(cuts_q) - 1):
            keep[cuts_q[n] : cuts_q[n + 1], cuts_k[n] : cuts_k[n + 1]] = True
        return Pattern(align=BOTTOM_RIGHT, starts=(numbers(*cuts_q), numbers(*cuts_k))), keep
    return Pattern(), torch.ones(L_q, L_k, dtype=torch.bool)


def _operands(generator: torch.Generator, keep: Tensor, d: int, d_v: int, H: int) -> tuple[Tensor, ...]:
    (L_q, L_k), H_kv = keep.shape, 2
    bits = max((L_k - 1).bit_length() - 1, 1)
    code = 1.0 - 2.0 * ((torch.arange(L_k)[:, None] // 2 >> torch.arange(bits)) & 1).double()  # (L_k, bits)
    k = torch.zeros(1, H_kv, L_k, d, dtype=torch.float64)
    k[..., :bits], k[..., bits] = code, float(bits)
    pick = torch.rand(1, H, L_q, L_k, generator=generator).masked_fill(~keep, -1.0).argmax(-1)  # a key that is seen
    q = torch.zeros(1, H, L_q, d, dtype=torch.float64)
    q[..., :bits], q[..., bits] = 4 * code[pick], -4.0
    v = torch.randint(-2, 3, (1, H_kv, L_k, d_v), generator=generator).double()
    do = torch.randint(-1, 2, (1, H, L_q, d_v), generator=generator).double()
    do *= torch.rand(do.shape, generator=generator) < 6 / d_v  # few, so that sums of products stay small integers
    return q, k, v, do


def _exact(q: Tensor, k: Tensor, v: Tensor, do: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    """o, dq / scale, dk / scale and dv in float64."""
    group = q.shape[1] // k.shape[1]
    k_all, v_all = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    best = ((q @ k_all.transpose(-1, -2)) == 0) & keep
    p = best.double() / best.sum(-1, keepdim=True).clamp(min=1)
    o = p @ v_all
    ds = p * (do @ v_all.transpose(-1, -2) - (o * do).sum(-1, keepdim=True))
    by_kv = (1, k.shape[1], group)

    def summed(t: Tensor) -> Tensor:
        return t.reshape(*by_kv, *t.shape[2:]).sum(2)

    return o, ds @ k_all, summed(ds.transpose(-1, -2) @ q), summed(p.transpose(-1, -2) @ do)
