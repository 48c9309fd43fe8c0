"""Other people's attention, where it can be imported and computes the same: for the benchmark only."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from minillm.checks import MissingPackageError, optional_import

BACKENDS = {"sdpa": None, "sdpa flash": "FLASH_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION"}


def _sdpa(backend: str | None, causal: bool) -> Callable:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return call


def _package(name: str) -> Any:
    try:
        return optional_import(name, "dev")
    except MissingPackageError:
        return None


def _flash(package: str, causal: bool, window: int | None) -> Callable | None:
    """FlashAttention 2 or 3: heads behind positions, and a window counts the keys before the query's own."""
    module = _package(package)
    if module is None:
        return None
    sizes = (-1, -1) if window is None else (window - 1, 0)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = module.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal, window_size=sizes)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return call


def _flex(causal: bool, window: int | None, documents: Tensor | None, L: int, device: str) -> Callable:
    """flex_attention, compiled; its mask of blocks is made once, outside of what is timed."""

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        keep = i >= j if causal else i >= 0
        if window is not None:
            keep = keep & (i - j < window)
        if documents is not None:
            keep = keep & (documents[i] == documents[j])
        return keep

    plain = not causal and window is None and documents is None
    mask = None if plain else create_block_mask(seen, None, None, L, L, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])  # type: ignore[return-value]

    return call


def dense_peers(causal: bool, window: int | None, L: int, device: str, compiled: bool) -> dict[str, Callable | None]:
    """Everything that might run on (B, H, L, d) tensors."""
    found: dict[str, Callable | None] = {}
    if window is None:
        found |= {name: _sdpa(backend, causal) for name, backend in BACKENDS.items()}
    found["fa3"] = _flash("flash_attn_interface", causal, window)
    found["fa2"] = _flash("flash_attn", causal, window)
    if compiled:
        torch._dynamo.reset()
        found["flex"] = _flex(causal, window, None, L, device)
    return found


def packed_peers(starts: Tensor, causal: bool, device: str, compiled: bool) -> dict[str, Callable | None]:
    """Everything that might run on packed (T, H, d) tensors; a loop over SDPA is what one writes without any of them."""
    cuts = starts.tolist()
    longest = max(b - a for a, b in zip(cuts, cuts[1:], strict=False))
    sdpa = _sdpa(None, causal)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            parts.append(sdpa(*(t[a:b].transpose(0, 1)[None] for t in (q, k, v)))[0].transpose(0, 1))
        return torch.cat(parts)

    def varlen(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = module.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    packages = {name: _package(module) for name, module in (("fa3", "flash_attn_interface"), ("fa2", "flash_attn"))}
    found: dict[str, Callable | None] = {"sdpa in a loop": loop}
    found |= {name: None if module is None else partial(varlen, module) for name, module in packages.items()}
    if compiled:
        torch._dynamo.reset()
        numbers = torch.repeat_interleave(torch.arange(len(cuts) - 1, device=device), starts.diff())
        flex = _flex(causal, None, numbers, cuts[-1], device)
        found["flex"] = lambda q, k, v: flex(*(t.transpose(0, 1)[None] for t in (q, k, v)))[0].transpose(0, 1)
    return found
