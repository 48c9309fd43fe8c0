"""Launching the decode kernels on tensors that `op.py` has checked: strides, parts, the merge."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
from torch import Tensor

from kernels import launching
from kernels.decode import kernel as device_code
from kernels.decode.config import Plan, padded, plan_for, widths
from kernels.launching import FUSED_MULTIPLY_ADD, multiprocessors, on

kernel: Any = device_code  # what triton.jit returns, no type checker follows
LOG2E = 1.4426950408889634


def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, table: Tensor | None, scale: float,
    window: int | None, softcap: float | None, latent: bool = False,
    max_length: int | None = None, plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention of q over the cache, and its log-sum-exp.

    Shapes: q (B, H, L_q, d), k (B, H_kv, capacity, d) or with a table (pages, H_kv, page, d), v alike of width d_v (in
    latent form the first columns of k), lengths (B,), table (B, pages of a sequence) -> (B, H, L_q, d_v), (B, H, L_q)
    """
    B, H, L_q, d = q.shape
    H_kv, page, d_v = k.shape[1], k.shape[2], v.shape[-1]
    capacity = page if table is None else page * table.shape[1]
    o = launching.empty((B, H, L_q, d_v), q.dtype, q.device)
    lse = launching.empty((B, H, L_q), torch.float32, q.device)
    if lse.numel() == 0:
        return o, lse
    if plan is None:
        keys = min(capacity, capacity if max_length is None else max_length)
        keys = keys if window is None else min(keys, window + L_q)
        plan = plan_for(
            B * H_kv, H // H_kv * L_q, keys, d, d_v, q.element_size(), multiprocessors(q.device),
            latent, table is not None, torch.version.hip is not None,
        )  # fmt: skip
    w = widths(d, d_v, latent)
    parts = lse_parts = None
    if plan.splits > 1:
        parts = launching.empty((plan.splits, B * H * L_q, d_v), torch.float32, q.device)
        lse_parts = launching.empty((plan.splits, B * H * L_q), torch.float32, q.device)
    blocks = -(-(H // H_kv * L_q) // plan.block_m)
    with on(q):
        kernel._decode_kernel[(B * H_kv * plan.splits * blocks,)](
            q, k, v, lengths, table, o if parts is None else parts, lse if lse_parts is None else lse_parts,
            H_kv, H // H_kv, L_q, capacity, window or 0, plan.splits,
            scale if softcap else scale * LOG2E, softcap or 1.0,
            *q.stride(), *k.stride(), *v.stride(), 0 if table is None else table.stride(0),
            MAIN=w.main, D=d, DV=d_v, PAGE=1 if table is None else page,
            WINDOWED=window is not None, CAPPED=softcap is not None, LATENT=latent,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_D=w.block, BLOCK_REST=w.rest, BLOCK_DV=w.block_v,
            STAGES=plan.stages, num_warps=plan.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
        if parts is not None and lse_parts is not None:
            _merge(parts, lse_parts, o, lse, plan.block_parts)
    return o, lse


def merge(parts: Tensor, lse_parts: Tensor, block_parts: int = 16) -> tuple[Tensor, Tensor]:
    """Merge parts of attention over disjoint sets of keys.

    Shapes: parts (n, ..., d_v), lse_parts (n, ...) -> (..., d_v), (...)
    """
    n, shape, d_v = parts.shape[0], parts.shape[1:-1], parts.shape[-1]
    o = launching.empty((*shape, d_v), parts.dtype, parts.device)
    lse = launching.empty(tuple(shape), torch.float32, parts.device)
    if lse.numel() == 0:
        return o, lse
    with on(parts):
        _merge(parts.reshape(n, lse.numel(), d_v), lse_parts.reshape(n, lse.numel()), o, lse, block_parts)
    return o, lse


def _merge(parts: Tensor, lse_parts: Tensor, o: Tensor, lse: Tensor, block_parts: int) -> None:
    """parts (n, n_rows, d_v), lse_parts (n, n_rows) of any strides -> o and lse, contiguous."""
    n, n_rows, d_v = parts.shape
    kernel._merge_kernel[(n_rows,)](
        parts, lse_parts, o, lse, n, n_rows, *parts.stride(), *lse_parts.stride(),
        DV=d_v, BLOCK_PARTS=block_parts, BLOCK_DV=padded(d_v),
        num_warps=4, num_stages=1, **FUSED_MULTIPLY_ADD,
    )  # fmt: skip
