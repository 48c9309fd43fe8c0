r"""How many tokens an expert takes, and what happens to the others: dropped, or sent elsewhere."""

from math import ceil, floor
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from minillm.autograd import Tensor, where
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.frozen import frozen
from minillm.functional.routing import check_routed, spread_scores, top_k


def capacity(c_cap: float, N: int, E: int, k: int, *, as_printed: bool = False) -> int:
    r"""The most tokens that one expert takes.

    Equation: `moe-capacity` $C_e=\lceil c_{\rm cap}\,kBL/E\rceil$
    Shapes: N = BL tokens -> number
    Raises: ValueError for a factor or size that is not positive, k > E, or a printed capacity of 0.
    Source: notes §8.8.
    Differs: with the factor k and rounded up; ``as_printed`` gives the source's $\lfloor c\,BL/E\rfloor$, which drops at
        least half of all assignments at k = 2 and is 0 when BL < E (erratum 39).
    """
    require_positive(c_cap, "capacity", "the capacity factor")
    require(bool(np.isfinite(c_cap)), "capacity", "the capacity factor", "finite", c_cap)
    for value, name in ((N, "the number of tokens"), (E, "E"), (k, "k")):
        require_positive(value, "capacity", name, integer=True)
    require(k <= E, "capacity", "k", f"at most E = {E}", k)
    if not as_printed:
        return ceil(c_cap * k * N / E - 1e-9)
    C = floor(c_cap * N / E)
    require(
        C > 0, "capacity", "the printed capacity", "at least 1", C, "It has fewer tokens than experts (erratum 39)."
    )
    return C


def check_capacity(where: str, C: Any) -> None:
    """Refuse a capacity that is not a positive integer."""
    fits = isinstance(C, int | np.integer) and not isinstance(C, bool) and bool(C >= 1)
    require(fits, where, "the capacity C", "a positive integer", C)


def _matrix(where: str, routed: Any) -> np.ndarray:
    routed = frozen(routed)
    require(routed.dtype == bool and routed.ndim == 2, where, "the choice", "booleans of shape (N, E)", routed)
    return routed


def drop_overflow(routed: Any, C: int) -> Bool[np.ndarray, "N E"]:
    r"""Keep the first C tokens of every expert.

    Equation: `moe-drop` excess assignments contribute 0; assignments served in token order; gates are not renormalised
    Shapes: routed booleans (N, E) -> booleans (N, E), the assignments that remain
    Raises: ValueError for a choice that is not a boolean matrix, or a capacity below 1.
    Source: notes §8.8 (dropping).
    """
    routed = _matrix("drop_overflow", routed)
    check_capacity("drop_overflow", C)
    return routed & (routed.cumsum(0) <= C)


def reroute_overflow(scores: Any, routed: Any, C: int) -> Bool[np.ndarray, "N E"]:
    r"""Send what does not fit to the next-best expert with room; drop it only when there is none.

    All first choices are served before any leftover, so nobody loses a place to a rerouted token. Leftovers are served
    in token order. An expert that a token wanted, whether or not it had room, is not offered to it again.

    Equation: `moe-reroute` send to the next-best expert with room, never the same expert twice for one token
    Shapes: scores (N, E), routed booleans (N, E) -> booleans (N, E), at most as many true in a row as routed has
    Raises: ValueError for a choice of another shape or type, or a capacity below 1.
    Source: notes §8.8 (rerouting).
    """
    scores, routed = frozen(scores), _matrix("reroute_overflow", routed)
    check_routed("reroute_overflow", routed, scores.shape)
    check_capacity("reroute_overflow", C)
    served = drop_overflow(routed, C)
    room = C - served.sum(0)  # (E,)
    for n in np.flatnonzero((routed & ~served).any(-1)):
        for e in np.argsort(-scores[n], kind="stable"):
            if served[n].sum() == routed[n].sum():
                break
            if room[e] > 0 and not routed[n, e]:
                served[n, e] = True
                room[e] -= 1
    return served


def drop_rate(routed: Any, served: Any) -> float:
    r"""The share of wanted assignments that found no place.

    Equation: `moe-drop` drop rate $1-\frac{\text{assignments served}}{kBL}$
    Shapes: routed, served booleans (N, E) -> number in [0, 1]; 0 when nothing was wanted
    Raises: ValueError unless both are boolean matrices of one shape.
    Source: notes §8.8.
    """
    routed = _matrix("drop_rate", routed)
    served = check_routed("drop_rate", served, routed.shape)
    wanted = int(routed.sum())
    return 1.0 - int(served.sum()) / wanted if wanted else 0.0


def _example_rerouted(rng):
    p = spread_scores(rng, *[(4, 3), (5, 4), (1, 2)][rng.integers(3)]) + 9
    routed = top_k(p, 2)
    return (p, routed, reroute_overflow(p, routed, int(rng.integers(1, 4)))), {}


@written("rerouted_gates", example=_example_rerouted)
def rerouted_gates(
    p: Float[Tensor, "N E"], routed: Bool[np.ndarray, "N E"], served: Bool[np.ndarray, "N E"]
) -> Float[Tensor, "N E"]:
    r"""Weights after rerouting: a replacement counts with its own score.

    A token that got as many experts as it wanted has weights of sum 1. One that lost an expert for good keeps the
    divisor it had, so that the others are not blown up.

    Equation: `moe-reroute` $g_e=P_e/\sum_{j\in\mathcal S}P_j$, $\mathcal S$ the experts that serve the token, or those it wanted
        if it lost one
    Shapes: p (N, E), routed and served booleans (N, E) -> (N, E), 0 where not served
    Raises: ValueError for choices of another shape or type.
    Source: notes §8.8 (rerouting).
    """
    routed = check_routed("rerouted_gates", routed, p.shape)
    served = check_routed("rerouted_gates", served, p.shape)
    complete = served.sum(-1, keepdims=True) == routed.sum(-1, keepdims=True)
    counted = np.where(complete, served, routed)
    total = where(counted, p, 0.0).sum(-1, keepdims=True)
    return where(served, p, 0.0) / where(counted.any(-1, keepdims=True), total, 1.0)
