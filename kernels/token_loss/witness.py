"""Problems whose answers are known exactly: rows with a power of two of equal logits, and integers for the products.

A row whose 2^k largest logits are equal and whose others are -infinity has LSE = z + k log 2 (in base 2: exactly k),
p = 2^-k and entropy k log 2; with coefficients that are powers of two the gradient is exact. For the fused linear loss
one-hot rows of hidden states pick integer columns of a head, so that every partial sum is an integer. Results must be
equal, not close: no tolerance hides a wrong lane, a lost tile or a miscompiled product. Needs torch alone, so that it runs on any GPU
machine; `python -m kernels bench` runs it before it times anything.
"""

import math
from collections.abc import Iterator

import torch

from kernels.problem import mismatches
from kernels.token_loss import launch, launch_linear
from kernels.token_loss.config import LinearPlan, LinearTile, RowTile

VOCABULARIES_GPU = (16, 1024, 4096, 16_384, 32_768, 128_256, 262_144)
VOCABULARIES_TIMED = (4096, 128_256)
HEADS_GPU = ((256, 512, 256), (1000, 1000, 320))  # N, V, d
SMALL_ROWS = RowTile(2, 16, 1, 2)
SMALL_LINEAR = LinearPlan(
    LinearTile(16, 16, 16, 1, 1, 2), LinearTile(16, 16, 16, 1, 1, 2), LinearTile(16, 16, 16, 1, 1), 2, 32
)


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    gpu = device != "cpu"
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if gpu else (torch.float32, torch.float16)
    for dtype in dtypes[2:] if short and gpu else dtypes:
        for V in (VOCABULARIES_TIMED if short else VOCABULARIES_GPU) if gpu else (16, 64):
            yield f"rows V={V} {dtype}", rows_wrong(device, V, dtype)
            if short:
                continue
            yield f"rows V={V} {dtype} strided", rows_wrong(device, V, dtype, strided=True)
        if not gpu:
            yield f"rows V=64 {dtype} in small tiles", rows_wrong(device, 64, dtype, SMALL_ROWS)
        for N, V, d in HEADS_GPU[: 1 if short else None] if gpu else ((20, 40, 24),):
            yield f"head N={N} V={V} d={d} {dtype}", head_wrong(device, N, V, d, dtype, None if gpu else SMALL_LINEAR)


def _placed(values: torch.Tensor, dtype: torch.dtype, device: str, strided: bool) -> torch.Tensor:
    made = values.to(dtype).to(device)
    if not strided:
        return made
    wide = torch.full((*made.shape[:-1], 2 * made.shape[-1]), float("nan"), dtype=dtype, device=device)
    wide[..., ::2] = made
    return wide[..., ::2]


def rows_wrong(device: str, V: int, dtype: torch.dtype, tile: RowTile | None = None, strided: bool = False) -> int:
    """Wrong elements among statistics, gradient, loss and gradient in one launch (also over the logits), softmax."""
    generator = torch.Generator().manual_seed(V)
    n_rows = 37 if device != "cpu" else 5
    k = torch.randint(0, min(int(math.log2(V)), 10) + 1, (n_rows,), generator=generator)  # 2^k possible tokens
    order = torch.rand(n_rows, V, generator=generator).argsort(-1)
    possible = order < (2**k)[:, None]  # (n_rows, V)
    height = torch.randint(-8, 9, (n_rows,), generator=generator).float()
    logits = torch.where(possible, height[:, None], -math.inf)
    targets = possible.float().argmax(-1)
    targets[n_rows // 2] = -100
    keep = targets != -100
    log_p, p = -k.float(), torch.where(possible, 2.0 ** -k[:, None].float(), 0.0)
    onehot = torch.nn.functional.one_hot(targets.clamp(min=0), V).float()

    z, t = _placed(logits, dtype, device, strided), targets.to(device)
    found = launch.statistics(z, t, 1.0, -100, True, False, tile)
    in_bits = (found.log_sum.cpu() - torch.where(keep, k.float(), 0.0)).abs()
    wrong = int((in_bits != 0).sum()) + mismatches(found.top.cpu() + 0.0, torch.where(keep, height, 0.0) + 0.0)
    for name, exact in (("logp", log_p * math.log(2)), ("entropy", -log_p * math.log(2))):
        near = torch.where(keep, exact, 0.0)
        wrong += int(((getattr(found, name).cpu() - near).abs() > 1e-6 * near.abs()).sum())
    weight = 2.0 ** torch.randint(-2, 3, (n_rows,), generator=generator).float()
    gradient = torch.where(keep[:, None], weight[:, None] * (p - onehot), 0.0).to(dtype)
    minus = (-weight).to(device)
    ours = launch.gradient(z, t, found, (minus, None, None, None), 1.0, -100, tile=tile)
    wrong += mismatches(ours.cpu() + 0.0, gradient + 0.0)
    terms = launch.LikelihoodTerms()
    *_, once = launch.loss_and_gradient(z, t, weight.to(device), terms, 1.0, -100, inplace=False, tile=tile)
    wrong += mismatches(once.cpu() + 0.0, gradient + 0.0)
    y, _, _ = launch.softmax(z, False, tile)
    wrong += mismatches(y.cpu(), p.to(dtype))
    launch.loss_and_gradient(z, t, weight.to(device), terms, 1.0, -100, inplace=True, tile=tile)
    return wrong + mismatches(z.cpu().contiguous() + 0.0, gradient + 0.0)


def head_wrong(
    device: str, N: int, V: int, d: int, dtype: torch.dtype, plan: LinearPlan | None = None
) -> int:  # fmt: skip
    """Wrong elements among the largest logit and the gradients of hidden states and head, with p computed exactly.

    With hidden states of 0 every logit is 0 and p = 1/V for all; with coefficients V (a power of two of rows aside) the
    gradient of a logit is an integer, and both products are sums of integers.
    """
    generator = torch.Generator().manual_seed(N + V)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).float()

    hidden, weight = integers(-1, 1, N, d), integers(-1, 1, V, d)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[N // 3] = -100
    keep = targets != -100
    logits = hidden @ weight.T
    h, w, t = hidden.to(dtype).to(device), weight.to(dtype).to(device), targets.to(device)
    found = launch_linear.statistics(h, w, t, 1.0, -100, True, False, plan)
    wrong = mismatches(found.top.cpu() + 0.0, torch.where(keep, logits.max(-1).values, 0.0) + 0.0)
    # A coefficient at the target alone: with a huge recorded sum p vanishes, and the gradient is a times one-hot.
    far = launch.Statistics(found.logp, found.lse, found.entropy, None, found.top, found.log_sum + 1e6)
    a = integers(-2, 2, N)
    ours = launch_linear.gradient(h, w, t, far, (a.to(device), None, None, None), 1.0, -100, plan)
    dz = torch.zeros(N, V).scatter_(1, targets.clamp(min=0)[:, None], torch.where(keep, a, 0.0)[:, None])
    for result, exact in zip(ours, (dz @ weight, dz.T @ torch.where(keep[:, None], hidden, 0.0))):
        assert result is not None
        wrong += mismatches(result.cpu() + 0.0, exact.to(dtype) + 0.0)
    return wrong
