r"""The experts themselves: what each computes, and the layer in three forms that agree.

Weights of all experts lie in one array each: ``w_in`` (E, f_in, d_model) and ``w_down`` (E, d_model, d_ff), with f_in =
2 d_ff, [value; gate], for the gated kinds and d_ff for the others.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from minillm.autograd import Tensor, cat
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of
from minillm.functional.activations import geglu, gelu, silu, swiglu
from minillm.functional.dispatch import Packing, combine, dispatch, pack, pad_to_capacity, unpad
from minillm.functional.routing import check_routed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "relu": lambda h: h.relu(),
    "gelu": gelu,
    "silu": silu,
}
GATED = ("swiglu", "geglu")


def check_experts(where: str, d: int, w_in, w_down, activation: str) -> None:
    """Refuse weights that do not fit x or one another, or an activation that does not exist."""
    require_one_of(activation, ACTIVATIONS, where, "activation")
    require(w_in.ndim == 3 and w_in.shape[2] == d, where, "w_in", f"of shape (E, f_in, {d})", w_in)
    E, f_in, _ = w_in.shape
    d_ff = f_in // 2 if activation in GATED else f_in
    if activation in GATED:
        require(f_in % 2 == 0, where, "the second axis of w_in", "even, [value; gate]", w_in)
    require(w_down.shape == (E, d, d_ff), where, "w_down", f"of shape ({E}, {d}, {d_ff})", w_down)


def check_layer(where: str, x, gates, routed, w_in, w_down, activation: str) -> Bool[np.ndarray, "N E"]:
    """Refuse tokens, gates and a choice that do not fit the experts."""
    require(x.ndim == 2, where, "x", "of shape (N, d_model)", x, "Flatten batch and sequence first.")
    check_experts(where, x.shape[1], w_in, w_down, activation)
    wanted = (x.shape[0], w_in.shape[0])
    require(gates.shape == wanted, where, "the gates", f"of shape {wanted}", gates)
    return check_routed(where, routed, wanted)


def _weights(rng, E: int, d: int, activation: str):
    d_ff = 3
    return rng.normal(size=(E, d_ff * (2 if activation in GATED else 1), d)), rng.normal(size=(E, d, d_ff))


def _example_layer(rng):
    activation = ["swiglu", "geglu", "gelu", "silu"][rng.integers(4)]
    N, E = [(4, 3), (1, 2), (3, 1), (0, 2)][rng.integers(4)]
    routed = rng.random((N, E)) < 0.6
    gates = np.where(routed, rng.uniform(0.1, 1, size=(N, E)), 0.0)
    return (rng.normal(size=(N, 2)), gates, routed, *_weights(rng, E, 2, activation)), {"activation": activation}


def _example_expert(rng):
    activation = ["swiglu", "geglu", "gelu", "silu"][rng.integers(4)]
    w_in, w_down = _weights(rng, 1, 4, activation)
    return (rng.normal(size=[(2, 3, 4), (0, 4)][rng.integers(2)]), w_in[0], w_down[0]), {"activation": activation}


@written("expert", example=_example_expert)
def expert(
    x: Float[Tensor, "*B d"], w_in: Float[Tensor, "f_in d"], w_down: Float[Tensor, "d d_ff"], activation: str = "swiglu"
) -> Float[Tensor, "*B d"]:
    r"""One expert: a feed-forward network, gated or not.

    Equation: `moe-expert` $\mathbf Y_e=\mathrm{FFN}_e(\mathbf X_e)$
    Shapes: x (..., d_model), w_in (2 d_ff or d_ff, d_model), w_down (d_model, d_ff) -> (..., d_model)
    Raises: ValueError for weights that do not fit, or an unknown activation.
    Source: notes §8.8 (v).
    """
    check_experts("expert", x.shape[-1], w_in.unsqueeze(0), w_down.unsqueeze(0), activation)
    return ACTIVATIONS[activation](x @ w_in.T) @ w_down.T


@written("moe_output", example=_example_layer)
def moe_output(
    x: Float[Tensor, "N d"],
    gates: Float[Tensor, "N E"],
    routed: Bool[np.ndarray, "N E"],
    w_in: Float[Tensor, "E f_in d"],
    w_down: Float[Tensor, "E d d_ff"],
    *,
    activation: str = "swiglu",
) -> Float[Tensor, "N d"]:
    r"""Every expert on every token, weighted: what the layer means, at the price of all experts.

    Equation: `moe-output` $y=\sum_eG(x)_e\,E_e(x)$
    Shapes: x (N, d_model), gates (N, E), routed booleans (N, E), w_in (E, f_in, d_model), w_down (E, d_model, d_ff)
        -> (N, d_model); a gate counts only where routed
    Raises: ValueError for arguments that do not fit one another.
    Source: lecture06 (MoE); deepseek (general idea).
    Differs: the gate has an index; without it every expert gets the whole vector (erratum 37).
    """
    routed = check_layer("moe_output", x, gates, routed, w_in, w_down, activation)
    y = x * 0.0
    for e in range(routed.shape[1]):
        weight = gates[:, e : e + 1].masked_fill(~routed[:, e : e + 1], 0.0)  # (N, 1)
        y = y + weight * expert(x, w_in[e], w_down[e], activation)
    return y


@written("mixture_of_experts", example=_example_layer)
def mixture_of_experts(
    x: Float[Tensor, "N d"],
    gates: Float[Tensor, "N E"],
    routed: Bool[np.ndarray, "N E"],
    w_in: Float[Tensor, "E f_in d"],
    w_down: Float[Tensor, "E d d_ff"],
    *,
    activation: str = "swiglu",
) -> Float[Tensor, "N d"]:
    r"""Pack the tokens by expert, run every expert on its own, combine: experts with nothing to do are not run.

    Equation: `moe-output` $y=\sum_{e\in\mathcal T}G(x)_e\,E_e(x)$
    Equation: `moe-expert` $\mathbf Y_e=\mathrm{FFN}_e(\mathbf X_e)$ between `dispatch` and `combine`
    Shapes: as `moe_output`
    Raises: ValueError for arguments that do not fit one another.
    Source: notes §8.8 (iv) to (vi).
    """
    routed = check_layer("mixture_of_experts", x, gates, routed, w_in, w_down, activation)
    packing = pack(routed)
    packed, g = dispatch(x, gates, packing)  # (A, d_model), (A,)
    return combine(run_experts(packed, packing, w_in, w_down, activation=activation), g, packing)


def _example_run(rng):
    (x, _, routed, w_in, w_down), kwargs = _example_layer(rng)
    packing = pack(routed)
    return (x[packing.tokens], packing, w_in, w_down), kwargs


@written("run_experts", example=_example_run)
def run_experts(
    packed: Float[Tensor, "A d"],
    packing: Packing,
    w_in: Float[Tensor, "E f_in d"],
    w_down: Float[Tensor, "E d d_ff"],
    *,
    activation: str = "swiglu",
) -> Float[Tensor, "A d"]:
    r"""Every expert on the rows of its own.

    Equation: `moe-expert` $\mathbf Y_e=\mathrm{FFN}_e(\mathbf X_e)$
    Shapes: packed (A, d_model) -> (A, d_model)
    Raises: ValueError for weights that do not fit.
    Source: notes §8.8 (v).
    """
    check_experts("run_experts", packed.shape[-1], w_in, w_down, activation)
    pieces = [
        expert(packed[packing.rows(e)], w_in[e], w_down[e], activation)
        for e in range(packing.n_experts)
        if packing.loads[e]
    ]
    return cat(pieces, 0) if pieces else packed * 0.0


@written("padded_experts", example=lambda rng: _example_padded(rng))
def padded_experts(
    x: Float[Tensor, "N d"],
    gates: Float[Tensor, "N E"],
    routed: Bool[np.ndarray, "N E"],
    w_in: Float[Tensor, "E f_in d"],
    w_down: Float[Tensor, "E d d_ff"],
    *,
    C: int,
    activation: str = "swiglu",
) -> Float[Tensor, "N d"]:
    r"""The layer on buffers of fixed size: all experts in one batched product, as an accelerator wants it.

    Equation: `moe-pad` $(E,C,d)$ buffers, padded rows ignored
    Shapes: as `moe_output`
    Raises: ValueError for arguments that do not fit one another, or an expert with more than C tokens.
    Source: notes §8.8.
    """
    routed = check_layer("padded_experts", x, gates, routed, w_in, w_down, activation)
    packing = pack(routed)
    packed, g = dispatch(x, gates, packing)
    buffers = pad_to_capacity(packed, packing, C)  # (E, C, d_model)
    hidden = ACTIVATIONS[activation](buffers @ w_in.T)  # (E, C, d_ff)
    return combine(unpad(hidden @ w_down.T, packing), g, packing)


def _example_padded(rng):
    args, kwargs = _example_layer(rng)
    return args, kwargs | {"C": int(args[2].sum(0).max() + rng.integers(2))}


def _example_shared(rng):
    args, kwargs = _example_layer(rng)
    return (*args, *_weights(rng, int(rng.integers(1, 3)), 2, kwargs["activation"])), kwargs


@written("with_shared_experts", example=_example_shared)
def with_shared_experts(
    x: Float[Tensor, "N d"],
    gates: Float[Tensor, "N E"],
    routed: Bool[np.ndarray, "N E"],
    w_in: Float[Tensor, "E f_in d"],
    w_down: Float[Tensor, "E d d_ff"],
    shared_in: Float[Tensor, "K f_in d"],
    shared_down: Float[Tensor, "K d d_ff"],
    *,
    activation: str = "swiglu",
) -> Float[Tensor, "N d"]:
    r"""Routed experts beside shared ones, which every token visits with weight 1.

    Equation: `moe-shared-experts` $y=\sum_{s=1}^{K_s}E^{\rm sh}_s(x)+\sum_{e\in\mathcal T}g_eE_e(x)$
    Shapes: as `moe_output`; shared_in (K_s, f_in, d_model), shared_down (K_s, d_model, d_ff) -> (N, d_model)
    Raises: ValueError for arguments that do not fit one another.
    Source: deepseek (shared expert isolation); Dai et al. 2024.
    """
    check_experts("with_shared_experts", x.shape[-1], shared_in, shared_down, activation)
    y = mixture_of_experts(x, gates, routed, w_in, w_down, activation=activation)
    for w_s, d_s in zip(shared_in, shared_down, strict=True):
        y = y + expert(x, w_s, d_s, activation)
    return y
