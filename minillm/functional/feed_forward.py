r"""Feed-forward networks, plain and gated, as written; how wide they are and what share of a model they hold."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.activation_family import ACTIVATIONS, activation
from minillm.functional.linear import linear

GATES = {"glu": "sigmoid", "swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "bilinear": "identity"}  # fmt: skip


def _example_ffn(rng):
    name = ["gelu", "silu", "tanh"][rng.integers(3)]
    lead = [(2, 3), (), (4,)][rng.integers(3)]
    shapes = [(*lead, 3), (5, 3), (5,), (3, 5), (3,)]
    return tuple(rng.normal(size=shape) for shape in shapes), {"act": name}


@written("ffn", example=_example_ffn)
def ffn(
    x: Float[Tensor, "*B d"],
    w_1: Float[Tensor, "d_ff d"],
    b_1: Float[Tensor, " d_ff"] | None,
    w_2: Float[Tensor, "d d_ff"],
    b_2: Float[Tensor, " d"] | None,
    act: str = "gelu",
) -> Float[Tensor, "*B d"]:
    r"""The same two-layer network at every position.

    Equation: `ffn` $\mathbf W_2\,\phi_{\rm act}(\mathbf W_1\mathbf x+\mathbf b_1)+\mathbf b_2$
    Shapes: x (..., d), w_1 (d_ff, d), b_1 (d_ff,), w_2 (d, d_ff), b_2 (d,) -> (..., d); positions do not interact
    Raises: ValueError if the widths do not match or the activation is unknown.
    Source: bridging §1.3; notes §8.6.
    """
    return linear(activation(act)(linear(x, w_1, b_1)), w_2, b_2)


def _example_glu(rng):
    lead = [(2, 3), (), (4,)][rng.integers(3)]
    shapes = [(*lead, 3), (4, 3), (4, 3), (4,), (4,)]
    return tuple(rng.normal(size=shape) for shape in shapes), {
        "act": ["silu", "gelu", "sigmoid", "identity"][rng.integers(4)]
    }


@written("glu", example=_example_glu)
def glu(
    x: Float[Tensor, "*B d"],
    w_v: Float[Tensor, "d_ff d"],
    w_g: Float[Tensor, "d_ff d"],
    b_v: Float[Tensor, " d_ff"] | None = None,
    b_g: Float[Tensor, " d_ff"] | None = None,
    act: str = "sigmoid",
) -> Float[Tensor, "*B d_ff"]:
    r"""A linear map, gated entry by entry by the activation of another.

    Equation: `glu` $(\mathbf X\mathbf W_v+\mathbf b_v)\odot\phi_{\rm act}(\mathbf X\mathbf W_g+\mathbf b_g)$
    Equation: `reglu-bilinear` ReLU on the gate, or nothing
    Equation: `swiglu` with SiLU on the gate, `geglu` with GELU
    Shapes: x (..., d), w_v, w_g (d_ff, d), b_v, b_g (d_ff,) -> (..., d_ff)
    Raises: ValueError if the widths do not match or the activation is unknown.
    Source: notes §8.7; Dauphin et al. 2017, Shazeer 2020.
    Differs: the activation is on the gate, not on the value (erratum 18).
    """
    return linear(x, w_v, b_v) * activation(act)(linear(x, w_g, b_g))


@written(
    "glu_ffn",
    example=lambda rng: (tuple(rng.normal(size=s) for s in ((2, 3), (4, 3), (4, 3), (3, 4))), {"kind": "swiglu"}),
)
def glu_ffn(
    x: Float[Tensor, "*B d"],
    w_v: Float[Tensor, "d_ff d"],
    w_g: Float[Tensor, "d_ff d"],
    w_down: Float[Tensor, "d d_ff"],
    kind: str = "swiglu",
) -> Float[Tensor, "*B d"]:
    r"""A gated linear unit, and back to the model's width.

    Equation: `glu-ffn` $\mathrm{GLU}(\mathbf X)\,\mathbf W_{\rm down}$
    Shapes: x (..., d), w_v, w_g (d_ff, d), w_down (d, d_ff) -> (..., d)
    Raises: ValueError for an unknown kind or widths that do not match.
    Source: lecture06 (SwiGLU, step 3).
    Differs: no biases (erratum 7); the way back is part of the network (erratum 18).
    """
    require(kind in GATES, "glu_ffn", "the kind", "one of " + ", ".join(GATES), kind)
    return linear(glu(x, w_v, w_g, act=GATES[kind]), w_down)


def llama_width(d: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    r"""The inner width of LLaMA's feed-forward network.

    Equation: `llama-ffn-rounding` $d_{\rm ff}=m\lceil\lfloor c\lfloor\frac{8d}3\rfloor\rfloor/m\rceil$
    Equation: `ffn-expansion` about $\frac83$ of the width, rounded up
    Shapes: -> a width
    Raises: ValueError unless all are positive.
    Source: lecture06 (LLaMA table); Touvron et al. 2023.
    """
    require_positive(d, "llama_width", "d", integer=True)
    require_positive(multiple_of, "llama_width", "multiple_of", integer=True)
    require_positive(multiplier, "llama_width", "multiplier")
    return multiple_of * math.ceil(int(multiplier * (8 * d // 3)) / multiple_of)


def parity_width(d_ff: int) -> float:
    r"""The width at which a gated network has as many parameters as a plain one.

    Equation: `glu-param-parity` $3d\,d_{\rm ff}'=2d\,d_{\rm ff}\Rightarrow d_{\rm ff}'=\frac23d_{\rm ff}$, so 4 becomes $\frac83$
    Shapes: -> a width, before rounding
    Raises: ValueError unless d_ff is a positive integer.
    Source: topics #18; lecture06.
    """
    require_positive(d_ff, "parity_width", "d_ff", integer=True)
    return 2 * d_ff / 3


def expansion(d_ff: int, d_model: int) -> float:
    r"""How many times wider than the model its feed-forward network is.

    Equation: `ffn-expansion` $d_{\rm ff}/d_{\rm model}$: 4 at first, about $\frac83$ when gated, up to 3.5 since
    Shapes: -> a ratio
    Raises: ValueError unless both are positive integers.
    Source: notes §8.6.
    Differs: "around 2.4" is to be read as 2 to 4 (erratum 16).
    """
    require_positive(d_ff, "expansion", "d_ff", integer=True)
    require_positive(d_model, "expansion", "d_model", integer=True)
    return d_ff / d_model


def ffn_share(n_layers: int, ffn_parameters: int, parameters: int) -> float:
    r"""The share of a model's parameters that its feed-forward networks hold.

    Equation: `ffn-share` $\frac{N_{\rm layer}P_{\rm ffn}}{N_{\rm param}}$
    Shapes: -> a number in (0, 1)
    Raises: ValueError unless the networks fit into the model.
    Source: notes §8.6; topics #18.
    Differs: from 45 to 82 %, not 50 to 60 % as a rule (erratum 17).
    """
    for name, value in (("n_layers", n_layers), ("ffn_parameters", ffn_parameters), ("parameters", parameters)):
        require_positive(value, "ffn_share", name, integer=True)
    inside = n_layers * ffn_parameters <= parameters
    require(inside, "ffn_share", "the networks' parameters", f"at most {parameters}", n_layers * ffn_parameters)
    return n_layers * ffn_parameters / parameters


@written(
    "apply_fixed_attention",
    example=lambda rng: ((rng.dirichlet(np.ones(4), size=(2, 3)), rng.normal(size=(2, 4, 3))), {}),
)
def apply_fixed_attention(A: Float[Tensor, "B L_q L_k"], V: Float[Tensor, "B L_k d"]) -> Float[Tensor, "B L_q d"]:
    r"""Mixing with given weights: a linear map of the values, whatever made the weights.

    Equation: `attention-linear-in-values` $\mathbf A(\alpha\mathbf V_1+\mathbf V_2)=\alpha\mathbf A\mathbf V_1+\mathbf A\mathbf V_2$
    Shapes: A (B, L_q, L_k), V (B, L_k, d) -> (B, L_q, d)
    Source: notes §8.6.
    """
    return A @ V


def rank_residual(X: Float[np.ndarray, "L d"]) -> float:
    r"""How far the rows are from being all the same, as a share of their size.

    Equation: `rank-collapse` $\lVert\mathbf X-\mathbf 1\bar x^\top\rVert/\lVert\mathbf X\rVert$
    Shapes: X (L, d) -> a number in [0, 1]
    Raises: ValueError unless X has two axes and is not 0.
    Source: notes §8.6; Dong et al. 2021.
    """
    size = float(np.linalg.norm(X)) if X.ndim == 2 else 0.0
    require(size > 0, "rank_residual", "X", "a matrix (L, d) that is not 0", X)
    return float(np.linalg.norm(X - X.mean(0)) / size)


def collapse_by_depth(
    L: int, d: int, depth: int, rng: np.random.Generator, *, skip: bool = False
) -> Float[np.ndarray, " depth_plus_1"]:
    r"""The rank residual after each of some layers of pure attention, with or without residual additions.

    Equation: `rank-collapse` without additions and FFN the residual shrinks with depth, faster than geometrically
    Shapes: -> (depth + 1,)
    Raises: ValueError unless the sizes are positive.
    Source: notes §8.6; Dong et al. 2021.
    """
    for name, value in (("L", L), ("d", d), ("depth", depth)):
        require_positive(value, "collapse_by_depth", name, integer=True)
    X: Any = rng.normal(size=(L, d))
    residuals = [rank_residual(X)]
    for _ in range(depth):
        w_q, w_k, w_v = (rng.normal(size=(d, d)) / np.sqrt(d) for _ in range(3))
        scores = (X @ w_q) @ (X @ w_k).T / np.sqrt(d)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        branch = weights / weights.sum(-1, keepdims=True) @ (X @ w_v)
        X = X + branch if skip else branch
        X = X / np.sqrt((X**2).mean())
        residuals.append(rank_residual(X))
    return np.array(residuals)


__all__ = [
    "ACTIVATIONS", "GATES", "apply_fixed_attention", "collapse_by_depth", "expansion", "ffn", "ffn_share", "glu", "glu_ffn",
    "llama_width", "parity_width", "rank_residual",
]  # fmt: skip
