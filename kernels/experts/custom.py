"""The experts as custom ops: what a tracer sees. An op may not return None, nor one of its inputs."""

import torch
from torch import Tensor

from kernels.experts import launch, launch_routing

INT = torch.int32


@torch.library.custom_op("minillm::route", mutates_args=())
def route_op(
    logits: Tensor, bias: Tensor | None, k: int, sigmoid: bool, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gates, experts, loads, auxiliary loss, z-loss."""
    return launch_routing.route(logits, bias, k, sigmoid, renormalise)


@route_op.register_fake
def _route_fake(logits, bias, k, sigmoid, renormalise):
    N, E = logits.shape
    single = {"dtype": torch.float32}
    return (
        logits.new_empty((N, k), **single), logits.new_empty((N, k), dtype=INT), logits.new_empty((E,), dtype=INT),
        logits.new_empty((), **single), logits.new_empty((), **single),
    )  # fmt: skip


@torch.library.custom_op("minillm::route_backward", mutates_args=())
def route_backward_op(
    logits: Tensor, experts: Tensor, loads: Tensor, dgates: Tensor | None, daux: Tensor | None, dz: Tensor | None,
    sigmoid: bool, renormalise: bool,
) -> Tensor:  # fmt: skip
    """The gradient of the logits."""
    return launch_routing.route_backward(logits, experts, loads, dgates, daux, dz, sigmoid, renormalise)


@route_backward_op.register_fake
def _route_backward_fake(logits, experts, loads, dgates, daux, dz, sigmoid, renormalise):
    return logits.new_empty(logits.shape)


def _keep_route(ctx, inputs, output):
    logits, _, _, *ctx.flags = inputs
    ctx.save_for_backward(logits, output[1], output[2])
    ctx.set_materialize_grads(False)


def _pull_route(ctx, dgates, _experts, _loads, daux, dz):
    if dgates is None and daux is None and dz is None:
        return None, None, None, None, None
    return route_backward_op(*ctx.saved_tensors, dgates, daux, dz, *ctx.flags), None, None, None, None


route_op.register_autograd(_pull_route, setup_context=_keep_route)


@torch.library.custom_op("minillm::pack_assignments", mutates_args=())
def pack_op(experts: Tensor, n_experts: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Order, places, offsets."""
    return launch_routing.pack(experts, n_experts, capacity)


@pack_op.register_fake
def _pack_fake(experts, n_experts, capacity):
    return (
        experts.new_empty((experts.numel(),), dtype=INT), experts.new_empty(experts.shape, dtype=INT),
        experts.new_empty((n_experts + 1,), dtype=INT),
    )  # fmt: skip


@torch.library.custom_op("minillm::grouped_linear", mutates_args=())
def grouped_linear_op(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Every group of rows times its own matrix, transposed."""
    return launch.grouped_linear(x, w, offsets)


@grouped_linear_op.register_fake
def _grouped_linear_fake(x, w, offsets):
    return x.new_empty((x.shape[0], w.shape[1]))


@torch.library.custom_op("minillm::grouped_linear_backward", mutates_args=())
def grouped_linear_backward_op(dy: Tensor, x: Tensor, w: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and w."""
    return launch.grouped_linear_backward(dy, x, w, offsets)


@grouped_linear_backward_op.register_fake
def _grouped_linear_backward_fake(dy, x, w, offsets):
    return x.new_empty(x.shape), w.new_empty(w.shape)


def _keep_grouped(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _pull_grouped(ctx, dy):
    return *grouped_linear_backward_op(dy, *ctx.saved_tensors), None


grouped_linear_op.register_autograd(_pull_grouped, setup_context=_keep_grouped)


@torch.library.custom_op("minillm::experts", mutates_args=())
def experts_op(
    x: Tensor, gates: Tensor, w_in: Tensor, w_down: Tensor, experts: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer's output, then order, places, offsets and the first product, which the backward needs."""
    z, kept = launch.layer(x, gates, w_in, w_down, experts, capacity)
    return z, *kept


@experts_op.register_fake
def _experts_fake(x, gates, w_in, w_down, experts, capacity):
    rows = experts.numel()
    return x.new_empty(x.shape), *_pack_fake(experts, w_in.shape[0], capacity), x.new_empty((rows, w_in.shape[1]))


@torch.library.custom_op("minillm::experts_backward", mutates_args=())
def experts_backward_op(
    dz: Tensor, x: Tensor, gates: Tensor, w_in: Tensor, w_down: Tensor,
    order: Tensor, places: Tensor, offsets: Tensor, h: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, gates, w_in and w_down."""
    return launch.layer_backward(dz, x, gates, w_in, w_down, (order, places, offsets, h))


@experts_backward_op.register_fake
def _experts_backward_fake(dz, x, gates, w_in, w_down, order, places, offsets, h):
    return tuple(t.new_empty(t.shape) for t in (x, gates, w_in, w_down))


def _keep_experts(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _pull_experts(ctx, dz, *_):
    return *experts_backward_op(dz, *ctx.saved_tensors), None, None


experts_op.register_autograd(_pull_experts, setup_context=_keep_experts)
