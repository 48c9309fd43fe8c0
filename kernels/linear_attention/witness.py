"""Problems whose answers are known exactly: sparse integer features whose denominators stay powers of two.

Every column of the features starts with a normaliser of 2 and gets at most two keys, of 2 and then 4, so that it passes
from 2 to 4 to 8; a query looks at one column. Values, states and cotangents are -1, 0 or 1 in few places. Then every
intermediate result, in the backward too, is a small integer over a power of two and has few enough bits for bfloat16, so
results must be *equal*: no tolerance hides a lost chunk, a wrong state or a miscompiled instruction. Needs torch alone.
"""

from collections.abc import Iterator

import torch

from kernels.linear_attention import launch
from kernels.linear_attention.config import Plan
from kernels.problem import mismatches

SMALL = Plan(16, 1, 16, 1)
SHAPES = ((1, 2, 40, 16, 24), (2, 1, 33, 24, 16))
SHAPES_GPU = ((2, 4, 1000, 64, 64), (1, 2, 2048, 128, 128), (1, 1, 500, 64, 128), (1, 2, 300, 256, 64), *SHAPES)


def witnesses(device: str, short: bool = False) -> Iterator[tuple[str, int]]:
    """The name of each exact problem and how many elements of its results are wrong.

    ``short``, on a GPU: what the benchmark is about to time alone.
    """
    gpu = device != "cpu"
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if gpu else (torch.float32, torch.float16)
    for shape in SHAPES_GPU[: 2 if short else None] if gpu else SHAPES:
        for dtype in dtypes[2:] if short and gpu else dtypes:
            for plan in (None, SMALL) if not gpu else (None,):
                for continued in (False, True) if gpu or plan else (True,):
                    name = f"{shape} {dtype}{' from a state' * continued}{' in small chunks' * (plan is not None)}"
                    yield name, wrong(device, shape, dtype, continued, plan)


def wrong(
    device: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, continued: bool, plan: Plan | None = None
) -> int:
    """How many elements of o, the final state and all gradients are not what they must be.

    Without a state before, every column gets a key of 2 at the first token instead.
    """
    B, H, L, d_phi, d_v = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def one_of(size: tuple[int, ...], places: int) -> torch.Tensor:
        """-1 or 1 in one place of the last axis."""
        signs = 2.0 * torch.randint(0, 2, (*size, 1), generator=generator) - 1
        where = torch.randint(0, places, (*size, 1), generator=generator)
        return torch.zeros(*size, places).scatter_(-1, where, signs)

    k = torch.zeros(B, H, L, d_phi)
    q = one_of((B, H, L), d_phi).abs() * (1 + torch.randint(0, 2, (B, H, L, 1), generator=generator))
    for b in range(B):
        for h in range(H):
            order = torch.randperm(L - 1, generator=generator)[: 2 * d_phi] + 1
            for n in range(len(order) // 2):
                first, second = sorted(order[2 * n : 2 * n + 2].tolist())
                k[b, h, first, n], k[b, h, second, n] = 2.0, 4.0
    v, do = one_of((B, H, L), d_v), one_of((B, H, L), d_v)
    state, z = one_of((B, H, d_phi), d_v), torch.full((B, H, d_phi), 2.0)
    ds, dz = one_of((B, H, d_phi), d_v), torch.randint(-1, 2, (B, H, d_phi), generator=generator).float()
    if not continued:
        k[:, :, 0] = 2.0
        state, z = torch.zeros_like(state), torch.zeros_like(z)

    exact = [t.double().requires_grad_() for t in (q, k, v, state, z)]
    a = (exact[0] @ exact[1].mT).tril()
    den = a.sum(-1) + (exact[0] @ exact[4][..., None])[..., 0]
    o = (a @ exact[2] + exact[0] @ exact[3]) / den[..., None]
    last, last_z = exact[3] + exact[1].mT @ exact[2], exact[4] + exact[1].sum(2)
    gradients = torch.autograd.grad((o, last, last_z), exact, [t.double() for t in (do, ds, dz)])

    def put(t: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        return t.detach().to(torch.float32).to(kind).to(device)

    given = (put(state, torch.float32), put(z, torch.float32)) if continued else (None, None)
    q, k, v = put(q, dtype), put(k, dtype), put(v, dtype)
    found = launch.forward(q, k, v, *given, 0.0, False, plan)
    arriving = put(do, dtype), put(ds, torch.float32), put(dz, torch.float32)
    pulled = launch.backward(*arriving, q, k, v, found[0], *found[3:], False, plan)
    kinds = (dtype, torch.float32, torch.float32, dtype, dtype, dtype, torch.float32, torch.float32)
    pairs = zip((*found[:3], *pulled), (o, last, last_z, *gradients), kinds, strict=True)
    return sum(mismatches(x + 0.0, put(truth, kind) + 0.0) for x, truth, kind in pairs)
