"""Steps with exact answers: a first moment of small integers, no second one, and an eps that is a power of two."""

from collections.abc import Iterator

import torch

from kernels.adamw import launch, op
from kernels.problem import mismatches

SIZES = (1, 16, 1025)
SIZES_GPU = (*SIZES, 4096, 70_000, 2**22 + 7)


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    gpu = device != "cpu"
    dtypes = (torch.float32, torch.float16, *([torch.bfloat16] if gpu else []))
    for size in SIZES_GPU[4 if short else 0 :] if gpu else SIZES:
        for dtype in dtypes[::2] if short and gpu else dtypes:
            for master in (False, True):
                yield f"adamw{'_master' * master} {size} {dtype}", wrong(device, size, dtype, master)
        yield f"norm {size}", wrong_norm(device, size)


def wrong(device: str, size: int, dtype: torch.dtype, master: bool) -> int:
    """How many elements are not what they must be: with beta1 = 1/2, beta2 = 0 and g in {0, 8}, n = g^2 and eps = 8.

    theta - lr / (1 - 1/2) (m / 2 + g / 2) / (|g| + eps), whose denominators are 8 and 16, without decay.
    """
    generator = torch.Generator().manual_seed(size)

    def drawn(*of: float) -> torch.Tensor:
        return torch.tensor(of, dtype=torch.float32)[torch.randint(len(of), (size,), generator=generator)].to(device)

    theta, g, m, n = drawn(-2, -1, 0, 1, 2), drawn(0, 8), drawn(-16, 0, 16), drawn(0, 1)
    new_m, new_n = m / 2 + g / 2, g * g
    exact = theta - new_m / (g + 8)
    weight, parts = theta.clone(), (g.to(dtype), m, n, 0.5, 0.5, 0.0, 8.0, 0.0, 1)
    if master:
        found = op.adamw_master(theta.to(dtype), weight, *parts)
        wanted = (exact.to(dtype), exact, new_m, new_n)
    else:
        found = op.adamw(weight.to(dtype), *parts)
        wanted = (exact.to(dtype), new_m, new_n)
    return sum(mismatches(a + 0.0, b + 0.0) for a, b in zip(found, wanted))


def wrong_norm(device: str, size: int) -> int:
    """Whether a 3 at the end of one gradient and a 4 at the beginning of another have the norm 5."""
    p = torch.zeros(size, device=device)
    batch = launch.Batch([p, p], [p, p], [p, p], decayed=[True, True])
    one, other = torch.zeros(size, device=device), torch.zeros(size, device=device)
    one[-1], other[0] = 3.0, 4.0
    batch.read([one, other])
    norm, scale = launch.norm_and_scale([batch], 5.0)
    return int(norm.item() != 5.0) + int(scale.item() > 1.0)
