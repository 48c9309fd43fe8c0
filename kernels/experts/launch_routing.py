"""Launching the router and the packing on tensors that `op.py` has checked."""

# Triton types a kernel by its device code: launch options and the values of constexpr parameters are unknown to it.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import triton
from torch import Tensor

from kernels import launching
from kernels.experts import kernel_packing, kernel_routing
from kernels.experts.config import PackTile, RouteTile, next_power_of_two, pack_tile, route_programs, route_tile
from kernels.launching import FUSED_MULTIPLY_ADD, multiprocessors, on

routing: Any = kernel_routing  # what triton.jit returns, no type checker follows
packing: Any = kernel_packing
BALANCE_ELEMENTS = 4096
TILES_AT_ONCE = 64


def padded(n_experts: int) -> int:
    """Columns of a tile that holds a row of experts."""
    return max(next_power_of_two(n_experts), 16)


def shares_at_once(n_experts: int) -> int:
    """Programs' shares that the balance kernel adds in one step."""
    return min(max(BALANCE_ELEMENTS // padded(n_experts), 1), 64)


def route(
    logits: Tensor, bias: Tensor | None, k: int, sigmoid: bool, renormalise: bool,
    tile: RouteTile | None = None, programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gates (N, k) fp32, experts (N, k) int32, loads (E,) int32, and the two losses, fp32 without axes."""
    (N, E), device = logits.shape, logits.device
    gates = launching.empty((N, k), torch.float32, device)
    experts = launching.empty((N, k), torch.int32, device)
    loads = launching.empty((E,), torch.int32, device)
    aux, z = launching.empty((), torch.float32, device), launching.empty((), torch.float32, device)
    if N == 0:
        return gates, experts, loads.zero_(), aux.zero_(), z.zero_()
    tile = tile or route_tile(E)
    programs = programs or route_programs(N, tile, multiprocessors(device))
    share_p = launching.empty((programs, E), torch.float32, device)
    share_n = launching.empty((programs, E), torch.int32, device)
    share_z = launching.empty((programs,), torch.float32, device)
    with on(logits):
        routing._route_kernel[(programs,)](
            logits, bias, gates, experts, share_p, share_n, share_z,
            N, E, k, *logits.stride(), 0 if bias is None else bias.stride(0),
            SIGMOID=sigmoid, RENORMALISE=renormalise, BLOCK_T=tile.block_t, BLOCK_E=padded(E),
            BLOCK_K=next_power_of_two(k), num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
        routing._balance_kernel[(1,)](
            share_p, share_n, share_z, loads, aux, z, N, E, k, programs,
            BLOCK_S=shares_at_once(E), BLOCK_E=padded(E),
            num_warps=8, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return gates, experts, loads, aux, z


def route_backward(
    logits: Tensor, experts: Tensor, loads: Tensor, dgates: Tensor | None, daux: Tensor | None, dz: Tensor | None,
    sigmoid: bool, renormalise: bool, tile: RouteTile | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the logits (N, E); what does not arrive is None."""
    (N, E), k = logits.shape, experts.shape[1]
    dlogits = launching.empty((N, E), logits.dtype, logits.device)
    if N == 0:
        return dlogits
    tile = tile or route_tile(E)
    with on(logits):
        routing._route_backward_kernel[(triton.cdiv(N, tile.block_t),)](
            logits, experts, loads, dgates, daux, dz, dlogits,
            N, E, k, *logits.stride(), *((0, 0) if dgates is None else dgates.stride()),
            SIGMOID=sigmoid, RENORMALISE=renormalise, BLOCK_T=tile.block_t, BLOCK_E=padded(E),
            num_warps=tile.warps, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return dlogits


def pack(
    experts: Tensor, n_experts: int, capacity: int | None, tile: PackTile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Order (A,), places (N, k) and offsets (E + 1,), all int32: see `reference.pack`."""
    (N, k), device = experts.shape, experts.device
    A = N * k
    order = launching.empty((A,), torch.int32, device)
    places = launching.empty((N, k), torch.int32, device)
    offsets = launching.empty((n_experts + 1,), torch.int32, device)
    if A == 0:
        return order, places, offsets.zero_()
    tile = tile or pack_tile(A, n_experts)
    chunks = triton.cdiv(A, tile.chunk)
    counts = launching.empty((chunks, n_experts), torch.int32, device)
    limited, limit = capacity is not None, 0 if capacity is None else min(capacity, A)
    sizes = {"BLOCK_A": tile.block_a, "BLOCK_E": padded(n_experts)}
    launch = {"num_warps": tile.warps, "num_stages": 1, **FUSED_MULTIPLY_ADD}
    with on(experts):
        packing._count_kernel[(chunks,)](
            experts, counts, order, A, n_experts, k, tile.chunk, *experts.stride(), **sizes, **launch
        )
        packing._scan_kernel[(1,)](
            counts, offsets, chunks, n_experts, limit,
            LIMITED=limited, BLOCK_C=tile.block_c, BLOCK_E=padded(n_experts), **launch,
        )  # fmt: skip
        packing._place_kernel[(chunks,)](
            experts, counts, offsets, order, places, A, n_experts, k, tile.chunk, limit, *experts.stride(),
            LIMITED=limited, **sizes, **launch,
        )  # fmt: skip
    return order, places, offsets


def tiles(offsets: Tensor, n_rows: int, block_m: int) -> Tensor:
    """The list of tiles (3, ceil(n_rows / block_m) + E): expert, first row, end; as long as any loads could need."""
    E = len(offsets) - 1
    n_tiles = triton.cdiv(n_rows, block_m) + E
    found = launching.empty((3, n_tiles), torch.int32, offsets.device)
    with on(offsets):
        packing._tiles_kernel[(triton.cdiv(n_tiles, TILES_AT_ONCE),)](
            offsets, found, n_rows, E, n_tiles, BLOCK_M=block_m, BLOCK_T=TILES_AT_ONCE, BLOCK_E=padded(E),
            num_warps=4, num_stages=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return found
