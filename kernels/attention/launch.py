"""Launching the attention kernels on tensors that `op.py` has checked: intervals, strides, buffers, grids."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import launching
from kernels.attention import kernel_backward, kernel_forward, kernel_masks
from kernels.attention.config import Plan, Tile, padded, plan_for
from kernels.launching import FUSED_MULTIPLY_ADD, INTERPRETED

masks: Any = kernel_masks  # what triton.jit returns, no type checker follows
forward_code: Any = kernel_forward
backward_code: Any = kernel_backward

DELTA_ROWS = 16
BOUNDS_BLOCK = 256
BOTTOM_RIGHT, TOP_LEFT = "bottom-right", "top-left"


@dataclass(frozen=True)
class Pattern:
    """Who sees whom. ``window`` is 0 without one; ``starts`` (queries', keys') are those of packed documents."""

    causal: bool = False
    window: int = 0
    align: str = BOTTOM_RIGHT
    key_lengths: Tensor | None = None  # (B,)
    prefix: Tensor | None = None  # (B,)
    starts: tuple[Tensor, Tensor] | None = None  # (n_documents + 1,) each

    def offset(self, L_q: int, L_k: int) -> int:
        """How many keys query 0 sees beyond key 0 under a causal mask."""
        return L_k - L_q if self.align == BOTTOM_RIGHT else 0


def like(tensor: Tensor, length: int, width: int, packed: bool) -> Tensor:
    """A buffer (B, heads, length, width), heads side by side in memory if the tensor has them so, else contiguous.

    Queries are mostly a view of (B, L, H, d_head), the output of a projection; what comes back in the same order
    needs no copy before the next one. Packed documents always have their heads side by side.
    """
    B, heads = tensor.shape[:2]
    if packed or (not tensor.is_contiguous() and tensor.transpose(1, 2).is_contiguous()):
        return launching.empty((B, length, heads, width), tensor.dtype, tensor.device).transpose(1, 2)
    return launching.empty((B, heads, length, width), tensor.dtype, tensor.device)


def plan_of(q: Tensor, v: Tensor) -> Plan:
    """The shipped tiles for these tensors on their device."""
    return plan_for(launching_target(q.device), q.element_size(), q.shape[-1], v.shape[-1])


def launching_target(device: torch.device) -> str:
    """The name of the machine that the tile sizes are for; the interpreter's are small, to cross blocks early."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def intervals(pattern: Pattern, L_q: int, L_k: int, queries: bool) -> tuple[Tensor | None, Tensor | None]:
    """The intervals of packed documents, for each query (or, not ``queries``, each key), or two times None."""
    if pattern.starts is None:
        return None, None
    here, there = pattern.starts if queries else pattern.starts[::-1]
    n, n_other = (L_q, L_k) if queries else (L_k, L_q)
    first = launching.empty((n,), torch.int32, here.device)
    last = launching.empty((n,), torch.int32, here.device)
    documents = here.shape[0] - 1
    if n:
        masks._bounds_kernel[(triton.cdiv(n, BOUNDS_BLOCK),)](
            here, there, first, last, n, n_other, documents, pattern.window,
            CAUSAL=pattern.causal, WINDOWED=pattern.window > 0, BOTTOM_RIGHT=pattern.align == BOTTOM_RIGHT,
            QUERIES=queries, STEPS=documents.bit_length(), BLOCK=BOUNDS_BLOCK, num_warps=4, num_stages=1,
            **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return first, last


def _constants(tile: Tile, pattern: Pattern, softcap: float | None, d: int, d_v: int) -> dict[str, Any]:
    return {
        "D": d, "DV": d_v, "CAUSAL": pattern.causal, "WINDOWED": pattern.window > 0, "CAPPED": softcap is not None,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": padded(d), "BLOCK_DV": padded(d_v),
        "num_warps": tile.warps, "num_stages": tile.stages, **FUSED_MULTIPLY_ADD,
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float, softcap: float | None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """o and the log-sum-exps.

    Shapes: q (B, H, L_q, d_head), k (B, H_kv, L_k, d_head), v (B, H_kv, L_k, d_v) -> o (B, H, L_q, d_v), lse (B, H, L_q)
    """
    (B, H, L_q, d), (_, H_kv, L_k, d_v) = q.shape, v.shape
    o = like(q, L_q, d_v, pattern.starts is not None)
    lse = launching.empty((B, H, L_q), torch.float32, q.device)
    if lse.numel() == 0:
        return o, lse
    tile = tile or plan_of(q, v).forward
    with launching.on(q):
        lo, hi = intervals(pattern, L_q, L_k, queries=True)
        forward_code._forward_kernel[(B * H * triton.cdiv(L_q, tile.block_m),)](
            q, k, v, o, lse, pattern.key_lengths, pattern.prefix, lo, hi,
            H, H // H_kv, L_q, L_k, pattern.offset(L_q, L_k), pattern.window, scale, softcap or 1.0,
            *q.stride(), *k.stride(), *v.stride(), *o.stride()[:3],
            **_constants(tile, pattern, softcap, d, d_v),
        )  # fmt: skip
    return o, lse


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    pattern: Pattern, scale: float, softcap: float | None, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Pull what arrives at o (and at the log-sum-exps) back to q, k and v.

    Shapes: do, o (B, H, L_q, d_v), dlse, lse (B, H, L_q) -> dq, dk, dv like q, k, v
    """
    (B, H, L_q, d), (_, H_kv, L_k, d_v) = q.shape, v.shape
    packed = pattern.starts is not None
    dq, dk, dv = like(q, L_q, d, packed), like(k, L_k, d, packed), like(v, L_k, d_v, packed)
    if lse.numel() == 0 or k.shape[2] * B == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    plan = plan or plan_of(q, v)
    group, offset, cap = H // H_kv, pattern.offset(L_q, L_k), softcap or 1.0
    delta = launching.empty((B, H, L_q), torch.float32, q.device)
    with launching.on(q):
        backward_code._delta_kernel[(triton.cdiv(B * H * L_q, DELTA_ROWS),)](
            o, do, dlse, delta, B * H * L_q, H, L_q,
            *o.stride()[:3], *do.stride(), *((0, 0, 0) if dlse is None else dlse.stride()),
            DV=d_v, BLOCK_M=DELTA_ROWS, BLOCK_DV=padded(d_v), num_warps=4, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
        first, last = intervals(pattern, L_q, L_k, queries=False)
        backward_code._backward_keys_kernel[(B * H_kv * triton.cdiv(L_k, plan.keys.block_n),)](
            q, k, v, do, lse, delta, dk, dv, pattern.key_lengths, pattern.prefix, first, last,
            H_kv, group, L_q, L_k, offset, pattern.window, scale, cap,
            *q.stride(), *k.stride(), *v.stride(), *do.stride(), *dk.stride()[:3], *dv.stride()[:3],
            **_constants(plan.keys, pattern, softcap, d, d_v),
        )  # fmt: skip
        lo, hi = intervals(pattern, L_q, L_k, queries=True)
        backward_code._backward_queries_kernel[(B * H * triton.cdiv(L_q, plan.queries.block_m),)](
            q, k, v, do, lse, delta, dq, pattern.key_lengths, pattern.prefix, lo, hi,
            H, group, L_q, L_k, offset, pattern.window, scale, cap,
            *q.stride(), *k.stride(), *v.stride(), *do.stride(), *dq.stride()[:3],
            **_constants(plan.queries, pattern, softcap, d, d_v),
        )  # fmt: skip
    return dq, dk, dv
