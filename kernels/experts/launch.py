"""Launching the products and the combination on tensors that `op.py` has checked."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import launching
from kernels.experts import kernel_combine, kernel_products
from kernels.experts.config import Plan, RowTile, Tile, plan, row_tile
from kernels.experts.launch_routing import pack, tiles
from kernels.launching import FUSED_MULTIPLY_ADD, on

products: Any = kernel_products  # what triton.jit returns, no type checker follows
combining: Any = kernel_combine
GATES_AT_ONCE = 1024


@functools.cache
def target_of(device: torch.device) -> str:
    """The architecture whose tiles a device gets: the newest known one that is not newer than it."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def plan_for(n_rows: int, n_experts: int, like: Tensor) -> Plan:
    """The tiles for tensors like this one."""
    return plan(n_rows, n_experts, like.element_size(), target_of(like.device))


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, **FUSED_MULTIPLY_ADD}


def _sizes(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": tile.group}


def grouped(
    x: Tensor, order: Tensor | None, k: int, w: Tensor, inner: int, listed: Tensor, n_rows: int, tile: Tile
) -> Tensor:
    """Rows of x, or with an order those of the assignments' tokens, times the matrix of their expert: (n_rows, n).

    ``inner`` is the axis of w (E, ., .) that is summed over: 2 for x W^T, 1 for x W.
    """
    n_cols, n_inner = w.shape[3 - inner], w.shape[inner]
    y = launching.empty((n_rows, n_cols), x.dtype, x.device)
    n_tiles = listed.shape[1]
    if n_rows and n_cols:
        with on(x):
            products._grouped_kernel[(n_tiles * triton.cdiv(n_cols, tile.block_n),)](
                x, order, w, listed, y, n_tiles, n_cols, n_inner, k, *x.stride(),
                w.stride(0), w.stride(inner), w.stride(3 - inner),
                GATHER=order is not None, **_sizes(tile), **_options(tile),
            )  # fmt: skip
    return y


def up(
    x: Tensor, order: Tensor, k: int, w_in: Tensor, listed: Tensor, keep: bool, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """The activations (A, d_ff) of all assignments, and if kept what they were made of, (A, 2 d_ff)."""
    A, d_ff = len(order), w_in.shape[1] // 2
    a = launching.empty((A, d_ff), x.dtype, x.device)
    h = launching.empty((A, 2 * d_ff), x.dtype, x.device) if keep else None
    n_tiles = listed.shape[1]
    with on(x):
        products._up_kernel[(n_tiles * triton.cdiv(d_ff, tile.block_n),)](
            x, order, w_in, listed, h, a, n_tiles, d_ff, x.shape[1], k, *x.stride(),
            w_in.stride(0), w_in.stride(2), w_in.stride(1), **_sizes(tile), **_options(tile),
        )  # fmt: skip
    return a, h


def activation_backward(
    u: Tensor, order: Tensor, k: int, h: Tensor, gates: Tensor, tile: RowTile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of h (A, 2 d_ff), the weighted activations (A, d_ff) and the gates' gradient by rows (A,)."""
    A, d_ff = u.shape
    dh = launching.empty((A, 2 * d_ff), u.dtype, u.device)
    ga = launching.empty((A, d_ff), u.dtype, u.device)
    dg = launching.empty((A,), torch.float32, u.device)
    tile = tile or row_tile(d_ff)
    with on(u):
        products._activation_backward_kernel[(triton.cdiv(A, tile.block_t),)](
            u, order, h, gates, dh, ga, dg, A, d_ff, k, *gates.stride(),
            BLOCK_R=tile.block_t, BLOCK_D=tile.block_d, num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return dh, ga, dg


def weight_gradient(
    p: Tensor, gather_p: bool, q: Tensor, gather_q: bool, order: Tensor | None, k: int, offsets: Tensor,
    dtype: torch.dtype, tile: Tile,
) -> Tensor:  # fmt: skip
    """For every expert the sum of P[j]^T Q[j] over its rows: (E, columns of p, columns of q)."""
    E, n_out, n_in = len(offsets) - 1, p.shape[1], q.shape[1]
    dw = launching.empty((E, n_out, n_in), dtype, p.device)
    if dw.numel() == 0:
        return dw
    programs = E * triton.cdiv(n_out, tile.block_m) * triton.cdiv(n_in, tile.block_n)
    sizes = {name: size for name, size in _sizes(tile).items() if name != "GROUP"}
    with on(p):
        products._weight_gradient_kernel[(programs,)](
            p, q, order, offsets, dw, n_out, n_in, k, *p.stride(), *q.stride(),
            GATHER_P=gather_p, GATHER_Q=gather_q, **sizes, **_options(tile),
        )  # fmt: skip
    return dw


def combine(y: Tensor, places: Tensor, gates: Tensor | None, tile: RowTile | None = None) -> Tensor:
    """For every token the sum of its experts' rows of y (A, d), weighted unless gates is None: (N, d)."""
    (N, k), d = places.shape, y.shape[1]
    z = launching.empty((N, d), y.dtype, y.device)
    if z.numel() == 0:
        return z
    tile = tile or row_tile(d)
    with on(y):
        combining._combine_kernel[(triton.cdiv(N, tile.block_t) * triton.cdiv(d, tile.block_d),)](
            y, places, gates, z, N, d, k, *((0, 0) if gates is None else gates.stride()),
            BLOCK_T=tile.block_t, BLOCK_D=tile.block_d, num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return z


def gate_gradient(dg: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the gates (N, k) out of that of the packed rows (A,)."""
    dgates = launching.empty(tuple(places.shape), dtype, places.device)
    with on(dg):
        combining._gate_gradient_kernel[(triton.cdiv(places.numel(), GATES_AT_ONCE),)](
            dg, places, dgates, places.numel(),
            BLOCK_A=GATES_AT_ONCE, num_warps=4, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return dgates


def _zeros_like(tensor: Tensor) -> Tensor:
    """Contiguous, whatever the strides of the tensor are."""
    return launching.empty(tuple(tensor.shape), tensor.dtype, tensor.device).zero_()


# ---- the product alone


def grouped_linear(x: Tensor, w: Tensor, offsets: Tensor, chosen: Plan | None = None) -> Tensor:
    """x (A, m), w (E, n, m) -> (A, n): x W^T by groups, zeros behind the last one."""
    tile = (chosen or plan_for(len(x), len(w), x)).down
    if x.numel() == 0:
        return launching.empty((len(x), w.shape[1]), x.dtype, x.device).zero_()
    return grouped(x, None, 1, w, 2, tiles(offsets, len(x), tile.block_m), len(x), tile)


def grouped_linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor, chosen: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of x (A, m) and of w (E, n, m)."""
    chosen = chosen or plan_for(len(x), len(w), x)
    if dy.numel() == 0:
        return _zeros_like(x), _zeros_like(w)
    listed = tiles(offsets, len(x), chosen.block_m)
    dx = grouped(dy, None, 1, w, 1, listed, len(x), chosen.down)
    return dx, weight_gradient(dy, False, x, False, None, 1, offsets, w.dtype, chosen.weights)


# ---- the layer, put together


Kept = tuple[Tensor, Tensor, Tensor, Tensor]  # order, places, offsets, h


def layer(
    x: Tensor, gates: Tensor, w_in: Tensor, w_down: Tensor, experts: Tensor, capacity: int | None,
    keep: bool = True, chosen: Plan | None = None,
) -> tuple[Tensor, Kept]:  # fmt: skip
    """The layer's output (N, d), and what its backward needs (h is empty where it is not kept)."""
    (N, d), (E, f_in, _), k = x.shape, w_in.shape, experts.shape[1]
    A = N * k
    order, places, offsets = pack(experts, E, capacity)
    if A == 0 or d == 0 or f_in == 0:
        z = launching.empty((N, d), x.dtype, x.device)
        return z.zero_(), (order, places, offsets, x.new_empty((A, f_in)))
    chosen = chosen or plan_for(A, E, x)
    listed = tiles(offsets, A, chosen.block_m)
    a, h = up(x, order, k, w_in, listed, keep, chosen.up)
    y = grouped(a, None, 1, w_down, 2, listed, A, chosen.down)
    return combine(y, places, gates), (order, places, offsets, x.new_empty((0, f_in)) if h is None else h)


def layer_backward(
    dz: Tensor, x: Tensor, gates: Tensor, w_in: Tensor, w_down: Tensor, kept: Kept, chosen: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, gates, w_in and w_down."""
    order, places, offsets, h = kept
    d, E, A = x.shape[1], len(w_in), len(order)
    k = places.shape[1]
    if A == 0 or d == 0 or h.shape[1] == 0:
        return _zeros_like(x), _zeros_like(gates), _zeros_like(w_in), _zeros_like(w_down)
    chosen = chosen or plan_for(A, E, x)
    listed = tiles(offsets, A, chosen.block_m)
    u = grouped(dz, order, k, w_down, 1, listed, A, chosen.down)
    dh, ga, dg = activation_backward(u, order, k, h, gates)
    dgates = gate_gradient(dg, places, gates.dtype)
    dx = combine(grouped(dh, None, 1, w_in, 1, listed, A, chosen.down), places, None)
    dw_down = weight_gradient(dz, True, ga, False, order, k, offsets, w_down.dtype, chosen.weights)
    dw_in = weight_gradient(dh, False, x, True, order, k, offsets, w_in.dtype, chosen.weights)
    return dx, dgates, dw_in, dw_down
