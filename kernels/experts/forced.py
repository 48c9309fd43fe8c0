"""The family's functions with sizes of a launch that somebody else chose: for the property that any launch is right."""

# What a star unpacks may be of any length to a type checker: it does not count arguments behind one.
# pyright: reportCallIssue=false

from collections.abc import Callable
from typing import Any

import torch

from kernels.experts import launch, launch_routing
from kernels.experts.config import PackTile, Plan, RouteTile, RowTile

PROGRAMS = 2  # of the router: each walks several blocks


def functions(sizes: tuple[Plan, RouteTile, PackTile, RowTile]) -> dict[str, Callable]:
    """`route`, `pack`, `grouped_linear` and `mixture_of_experts` at these sizes."""
    plan, route_tile, pack_tile, row_tile = sizes

    class Route(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, bias, k, scoring, renormalise):
            ctx.flags = scoring == "sigmoid", renormalise
            found = launch_routing.route(logits, bias, k, *ctx.flags, route_tile, PROGRAMS)
            ctx.save_for_backward(logits, found[1], found[2])
            ctx.mark_non_differentiable(found[1], found[2])
            return found

        @staticmethod
        def backward(ctx: Any, *arriving):
            dgates, _, _, daux, dz = arriving
            dlogits = launch_routing.route_backward(*ctx.saved_tensors, dgates, daux, dz, *ctx.flags, route_tile)
            return dlogits, None, None, None, None

    class Grouped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, offsets):
            ctx.save_for_backward(x, w, offsets)
            return launch.grouped_linear(x, w, offsets, plan)

        @staticmethod
        def backward(ctx: Any, *arriving):
            return *launch.grouped_linear_backward(*arriving, *ctx.saved_tensors, plan), None

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, gates, w_in, w_down, experts, capacity):
            z, kept = launch.layer(x, gates, w_in, w_down, experts, capacity, chosen=plan)
            ctx.save_for_backward(x, gates, w_in, w_down, *kept)
            return z

        @staticmethod
        def backward(ctx: Any, *arriving):
            saved = ctx.saved_tensors
            return *launch.layer_backward(*arriving, *saved[:4], saved[4:], plan), None, None

    return {
        "route": Route.apply,
        "pack": lambda experts, n_experts, capacity: launch_routing.pack(experts, n_experts, capacity, pack_tile),
        "grouped_linear": Grouped.apply,
        "mixture_of_experts": Layer.apply,
    }
