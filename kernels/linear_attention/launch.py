"""Launching the linear-attention kernels on tensors that `op.py` has checked: segments, their states, shares of columns."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
from torch import Tensor

from kernels import launching
from kernels.launching import FUSED_MULTIPLY_ADD, INTERPRETED, multiprocessors, on
from kernels.linear_attention import kernel as device_code
from kernels.linear_attention.config import Plan, padded, plan_for

kernel: Any = device_code  # what triton.jit returns, no type checker follows
SCAN_BLOCK = 1024
ARRIVING_ROWS = 16


def machine_of(device: torch.device) -> str:
    """Whose matrix instructions the device has. The interpreter takes Hopper's tiles: larger ones are faster there."""
    if INTERPRETED:
        return "hopper"
    generation = 0 if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]
    return {9: "hopper", 10: "blackwell"}.get(generation, "other")


def _plan(q: Tensor, d_v: int, plan: Plan | None) -> tuple[Plan, int, int, dict[str, Any]]:
    """The plan, its segments and blocks of value columns, and what every launch is given."""
    B, H, L, d_phi = q.shape
    plan = plan or plan_for(B * H, L, d_phi, d_v, q.element_size(), multiprocessors(q.device), machine_of(q.device))
    chunks = -(-L // plan.chunk)
    segments = -(-chunks // plan.per_segment)
    common = {"num_warps": plan.warps, "num_stages": 1, **FUSED_MULTIPLY_ADD}
    sizes = {"D_PHI": d_phi, "D_V": d_v, "CHUNK": plan.chunk, "BLOCK_PHI": padded(d_phi), "BLOCK_V": plan.block_v,
             "STAGES": plan.stages, **common}  # fmt: skip
    return plan, segments, -(-d_v // plan.block_v), sizes


def _segment_states(
    x: Tensor, y: Tensor, den: Tensor | None, c: Tensor | None, start: tuple[Tensor | None, Tensor | None],
    end: tuple[Tensor, Tensor], plan: Plan, segments: int, blocks: int, sizes: dict[str, Any], elu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state before every segment (with den: behind it), and into ``end`` what the last one leaves."""
    B, H, L, d_phi = x.shape
    d_v = y.shape[-1]
    states = launching.empty((B, H, segments, d_phi, d_v), torch.float32, x.device)
    weights = launching.empty((B, H, segments, d_phi), torch.float32, x.device)
    kernel._sums_kernel[(B * H * segments * blocks,)](
        x, y, den, c, states, weights, H, L, plan.per_segment, *x.stride(), *y.stride(), ELU=elu, **sizes
    )
    for sums, first, last in ((states, start[0], end[0]), (weights, start[1], end[1])):
        n = d_phi * d_v if sums is states else d_phi
        kernel._scan_kernel[(B * H * -(-n // SCAN_BLOCK),)](
            sums, first, last, segments, n, BACKWARDS=den is not None, BLOCK=SCAN_BLOCK,
            num_warps=4, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return states, weights


def forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, normaliser: Tensor | None, eps: float, elu: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Outputs, the final state and normaliser, the denominators, and the states before every segment for the backward.

    Shapes: q, k (B, H, L, d_phi), v (B, H, L, d_v), state (B, H, d_phi, d_v), normaliser (B, H, d_phi)
    """
    B, H, L, d_phi = q.shape
    d_v = v.shape[-1]
    o = launching.empty((B, H, L, d_v), v.dtype, v.device)
    den = launching.empty((B, H, L), torch.float32, v.device)
    last = launching.empty((B, H, d_phi, d_v), torch.float32, v.device)
    last_z = launching.empty((B, H, d_phi), torch.float32, v.device)
    state = None if state is None else state.contiguous()
    normaliser = None if normaliser is None else normaliser.contiguous()
    if den.numel() == 0:
        last = last.zero_() if state is None else last.copy_(state)
        last_z = last_z.zero_() if normaliser is None else last_z.copy_(normaliser)
        return o, last, last_z, den, state, normaliser
    plan, segments, blocks, sizes = _plan(q, d_v, plan)
    ends: tuple[Tensor | None, Tensor | None] = (last, last_z)
    with on(q):
        if segments > 1:
            state, normaliser = _segment_states(
                k, v, None, None, (state, normaliser), (last, last_z), plan, segments, blocks, sizes, elu
            )
            ends = (None, None)
        kernel._forward_kernel[(B * H * segments * blocks,)](
            q, k, v, state, normaliser, o, den, *ends, H, L, plan.per_segment, eps,
            *q.stride(), *k.stride(), *v.stride(), ELU=elu, **sizes,
        )  # fmt: skip
    return o, last, last_z, den, state, normaliser


def backward(
    do: Tensor, d_state: Tensor | None, d_normaliser: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor,
    den: Tensor, states: Tensor | None, normalisers: Tensor | None, elu: bool, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Pull do and what arrives at the final state back: dq, dk, dv, and the gradients of the initial state and normaliser.

    ``states`` and ``normalisers`` are those that the forward kept, with the same plan.
    """
    B, H, L, d_phi = q.shape
    d_v = v.shape[-1]
    dv = launching.empty((B, H, L, d_v), v.dtype, v.device)
    first = launching.empty((B, H, d_phi, d_v), torch.float32, v.device)
    first_z = launching.empty((B, H, d_phi), torch.float32, v.device)
    d_state = None if d_state is None else d_state.contiguous()
    d_normaliser = None if d_normaliser is None else d_normaliser.contiguous()
    if d_state is None and d_normaliser is not None:
        d_state = torch.zeros_like(first)
    if d_normaliser is None and d_state is not None:
        d_normaliser = torch.zeros_like(first_z)
    if den.numel() == 0:
        first = first.zero_() if d_state is None else first.copy_(d_state)
        first_z = first_z.zero_() if d_normaliser is None else first_z.copy_(d_normaliser)
        return torch.empty_like(q), torch.empty_like(k), dv, first, first_z
    plan, segments, blocks, sizes = _plan(q, d_v, plan)
    shares = v.dtype if blocks == 1 else torch.float32
    dq, dk = (launching.empty((blocks, B, H, L, d_phi), shares, v.device) for _ in range(2))
    c = launching.empty((B, H, L), torch.float32, v.device)
    strides = (*q.stride(), *k.stride(), *v.stride(), *do.stride())
    behind, behind_z = d_state, d_normaliser
    ends: tuple[Tensor | None, Tensor | None] = (first, first_z)
    with on(q):
        kernel._arriving_kernel[(-(-B * H * L // ARRIVING_ROWS),)](
            do, o, den, c, H, L, B * H * L, *do.stride(), D_V=d_v, BLOCK_ROWS=ARRIVING_ROWS,
            BLOCK_V=min(padded(d_v), 128), num_warps=4, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
        kernel._dq_kernel[(B * H * segments * blocks,)](
            q, k, v, do, den, c, states, normalisers, dq, H, L, plan.per_segment, B * H, *strides, ELU=elu, **sizes
        )
        if segments > 1:
            behind, behind_z = _segment_states(
                q, do, den, c, (d_state, d_normaliser), (first, first_z), plan, segments, blocks, sizes, elu
            )
            ends = (None, None)
        kernel._dk_kernel[(B * H * segments * blocks,)](
            q, k, v, do, den, c, behind, behind_z, dk, *ends, H, L, plan.per_segment, B * H, *strides, ELU=elu, **sizes
        )
        kernel._dv_kernel[(B * H * segments * blocks,)](
            q, k, do, den, behind, dv, H, L, plan.per_segment, *q.stride(), *k.stride(), *do.stride(),
            ELU=elu, **sizes,
        )  # fmt: skip
    if blocks == 1:
        return dq[0], dk[0], dv, first, first_z
    return dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dv, first, first_z
