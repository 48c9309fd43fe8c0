"""What is timed for decoding, beside torch's attention, flash-attention with a cache and FlashInfer where importable.

The limit of every case is the copy rate over the compulsory bytes: keys and values read once. Nothing here has been
measured in this repository unless `kernels/results` holds a file of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.contenders import Case, alike, brief, made
from kernels.decode import launch, op, traffic
from kernels.decode.config import plan_for
from minillm.checks import MissingPackageError, optional_import

# name: B, H, H_kv, L_q, capacity, d, d_v
SHAPES = {
    "batch 64, group of 4, 8k": (64, 32, 8, 1, 8192, 128, 128),
    "batch 1, group of 8, 32k": (1, 64, 8, 1, 32_768, 128, 128),
    "batch 1, group of 8, 8k": (1, 64, 8, 1, 8192, 128, 128),
    "batch 1, group of 8, 128k": (1, 64, 8, 1, 131_072, 128, 128),
    "batch 8, multi-head, 8k": (8, 32, 32, 1, 8192, 128, 128),
    "batch 16, group of 8, 4 new, 16k": (16, 64, 8, 4, 16_384, 128, 128),
    "batch 128, group of 4, 64 wide, 4k": (128, 32, 8, 1, 4096, 64, 64),
}
LATENT_SHAPES = {"batch 32, latent, 16 heads, 8k": (32, 16, 1, 1, 8192, 576, 512),
                 "batch 32, latent, 128 heads, 8k": (32, 128, 1, 1, 8192, 576, 512)}  # fmt: skip
QUICK = ("batch 64, group of 4, 8k", "batch 1, group of 8, 32k")
SMALLEST = {"smallest": (1, 4, 2, 1, 16, 16, 16)}  # for trying the machinery out


def _operands(shape: tuple[int, ...], device: str, latent: bool) -> list[Tensor]:
    B, H, H_kv, L_q, capacity, d, d_v = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    k_v = [(B, capacity, d)] if latent else [(B, H_kv, capacity, d), (B, H_kv, capacity, d_v)]
    sizes = [(B, H, L_q, d), *k_v]
    return [torch.randn(*size, generator=generator, device=device).to(dtype) for size in sizes]


def _sdpa(backend: SDPBackend | None) -> Callable[..., Any]:
    """torch's attention over a full cache; with several new tokens a mask that hides the later of them."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        L_q, L_k = q.shape[2], k.shape[2]
        mask = None
        if L_q > 1:
            mask = torch.ones(L_q, L_k, dtype=torch.bool, device=q.device).tril(L_k - L_q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert backend is not None
        with sdpa_kernel(backend):
            return call(q, k, v)

    return call if backend is None else chosen


def _flash_attention() -> Callable[..., Any] | None:
    """`flash_attn_with_kvcache`, which wants (B, L, H, d)."""
    for package in ("flash_attn_interface", "flash_attn"):
        try:
            function = optional_import(package, "dev").flash_attn_with_kvcache
        except (MissingPackageError, AttributeError):
            continue

        def call(q: Tensor, k: Tensor, v: Tensor, function=function) -> Tensor:
            turned = [t.transpose(1, 2) for t in (q, k, v)]
            return function(*turned, causal=True).transpose(1, 2)

        return call
    return None


def _flash_infer(q: Tensor) -> Callable[..., Any] | None:
    """FlashInfer's decoding of a single sequence, the form that needs no plan of its own."""
    if q.shape[0] != 1 or q.shape[2] != 1:
        return None
    try:
        function = optional_import("flashinfer", "dev").single_decode_with_kv_cache
    except (MissingPackageError, AttributeError):
        return None
    return lambda q, k, v: function(q[0, :, 0], k[0], v[0], kv_layout="HND")[None, :, None]


def _peers(operands: list[Tensor], say: Callable[[str], None]) -> dict[str, Callable]:
    candidates = {
        "sdpa": _sdpa(None), "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION), "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash_attn kvcache": _flash_attention(), "flashinfer": _flash_infer(operands[0]),
    }  # fmt: skip
    q, k, v = operands
    truth = op.decode_attention(q, k, v)[0].float()
    found = {}
    for name, function in candidates.items():
        if function is None:
            continue
        try:
            same = alike(function(*operands), truth)
        except Exception as error:  # a peer that does not run on this machine is left out, and said to be
            say(f"{name}: left out ({brief(error)})")
            continue
        if same:
            found[name] = function
        else:
            say(f"{name}: left out, its results differ from ours")
    return found


def cases(device: str, quick: bool, say: Callable[[str], None], shapes=None, compiled: bool = True) -> Iterator[Case]:
    """Plain caches beside peers, then the latent form, for which torch has none."""
    named = shapes or {n: s for n, s in SHAPES.items() if not quick or n in QUICK}
    with torch.no_grad():
        for name, shape in named.items():
            yield from made(_plain(name, shape, device, say), name)
        for name, shape in {} if quick or shapes else LATENT_SHAPES.items():
            yield from made(_latent(name, shape, device), name)


def _plain(name: str, shape: tuple[int, ...], device: str, say: Callable[[str], None]) -> Iterator[Case]:
    operands = _operands(shape, device, False)
    calls = {"ours": lambda q, k, v: op.decode_attention(q, k, v)[0], **_peers(operands, say)}
    yield _case(name, shape, operands, calls, False)


def _latent(name: str, shape: tuple[int, ...], device: str) -> Iterator[Case]:
    operands = _operands(shape, device, True)
    calls = {"ours": lambda q, c: op.latent_decode_attention(q, c, None, 512)[0]}
    yield _case(name, shape, operands, calls, True)


def _case(name: str, shape: tuple[int, ...], operands: list[Tensor], calls: dict[str, Callable], latent: bool) -> Case:
    B, H, H_kv, L_q, capacity, d, d_v = shape
    size, lengths = operands[0].element_size(), [capacity] * B
    kind = str(operands[0].dtype).removeprefix("torch.")
    return Case(
        name, kind, traffic.decode_bytes(lengths, H, H_kv, L_q, d, d_v, size, latent=latent),
        {peer: lambda function=function: function(*operands) for peer, function in calls.items()},
        traffic.decode_flops(lengths, H, L_q, d, d_v), line=f"{H}/{H_kv} heads of {d}, {B} texts", size=capacity,
    )  # fmt: skip


def sweep_cases(device: str, shapes=None) -> Iterator[Case]:
    """Half and double the splits and the keys of a tile, more and fewer tiles under way."""
    for name, shape in (shapes or SHAPES).items():
        B, H, H_kv, L_q, capacity, d, d_v = shape
        q, k, v = _operands(shape, device, False)
        own = plan_for(B * H_kv, H // H_kv * L_q, capacity, d, d_v, q.element_size(), launch.multiprocessors(q.device))
        plans = {
            str(plan): plan
            for splits in (own.splits // 2, own.splits, own.splits * 2)
            for block_n in (own.block_n // 2, own.block_n, own.block_n * 2)
            for stages in (2, 3, 4)
            if splits >= 1 and block_n >= 16
            for plan in (replace(own, splits=splits, block_n=block_n, stages=stages),)
        }
        calls = {
            key: lambda q, k, v, plan=plan: launch.decode(q, k, v, None, None, 0.1, None, None, plan=plan)
            for key, plan in plans.items()
        }
        yield _case(name, shape, [q, k, v], calls, False)
