r"""From token terms to one number: the divisor switch that every loss shares."""

from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, as_tensor, where
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of, require_positive
from minillm.functional.frozen import Array, frozen, kept_positions

REDUCTIONS = ("token-mean", "seq-mean", "seq-sum", "constant", "sum")


def _example(rng):
    shape = [(3, 4), (2, 1), (1, 5)][rng.integers(3)]
    mask = rng.random(shape) < 0.6
    mask[0] = False
    reduction = REDUCTIONS[rng.integers(5)]
    return (rng.normal(size=shape), mask), {"reduction": reduction, "length": 7}


def _example_mean(rng):
    shape = [(3, 4), (2,), (2, 1, 3)][rng.integers(3)]
    return (rng.normal(size=shape), rng.random(shape) < 0.6), {}


def aggregation_divisor(mask: Any, reduction: str, *, length: int | None = None) -> float:
    r"""The number that a reduction divides by, for the responses of one mask.

    It adds over micro-batches and ranks: sum it over all of them, and give the total to every `aggregate`.

    Equation: `loss-aggregation` divisor $\sum_{i,t}m_{i,t}$ (`token-mean`), $N$ (`seq-mean`, `seq-sum`),
        $NL_{\max}$ (`constant`)
    Shapes: mask (B, T) -> number
    Raises: ValueError for an unknown reduction, or for ``constant`` without a length.
    Source: bridging §2; deepseek (PPO for LLMs); notes §10.5; Yu et al. 2025 (DAPO); Liu et al. 2025 (Dr.
        GRPO).
    """
    require_one_of(reduction, REDUCTIONS, "aggregate", "reduction")
    keep = kept_positions(mask, np.shape(frozen(mask)), "aggregate")
    require(keep.ndim == 2, "aggregate", "the mask", "of shape (B, T)", keep)
    if reduction == "constant":
        require(
            length is not None,
            "aggregate",
            "length",
            "the largest response length for reduction='constant'",
            length,
        )
        require_positive(length, "aggregate", "length", integer=True)
        return float(len(keep) * int(length or 0))
    return {"token-mean": float(keep.sum()), "sum": 1.0}.get(reduction, float(len(keep)))


def aggregation_weights(
    mask: Any, reduction: str = "token-mean", *, length: int | None = None, divisor: float | None = None
) -> Float[np.ndarray, "B T"]:
    r"""The weight that each token has in the aggregated loss.

    Equation: `loss-aggregation` $w_{i,t}=\frac{m_{i,t}}{D}$, and for `seq-mean`
        $w_{i,t}=\frac{m_{i,t}}{D\sum_sm_{i,s}}$
    Shapes: mask (B, T) -> (B, T); all zero where the mask is.
    Raises: ValueError for an unknown reduction, a mask that is not (B, T), or a divisor that is not positive.
    Source: deepseek (PPO for LLMs); notes §10.5.
    Differs: the sources fix one divisor each; here it is a switch (errata 2 and 77).
    """
    own = aggregation_divisor(mask, reduction, length=length)
    keep = kept_positions(mask, np.shape(frozen(mask)), "aggregate")
    if divisor is not None:
        require(reduction != "sum", "aggregate", "divisor", "left out for reduction='sum'", divisor)
        require_positive(divisor, "aggregate", "divisor")
    weights = keep / (max(own, 1.0) if divisor is None else float(divisor))  # (B, T)
    if reduction == "seq-mean":
        weights /= np.maximum(keep.sum(-1, keepdims=True), 1)
    return weights


@written("aggregate", example=_example)
def aggregate(
    token_terms: Float[Array, "B T"],
    mask: Any,
    reduction: str = "token-mean",
    *,
    length: int | None = None,
    divisor: float | None = None,
) -> Float[Tensor, ""]:
    r"""Reduce token terms to one number; tokens that the mask drops have no effect, whatever they hold.

    A response whose tokens are all masked adds 0 (and still counts as one of the N responses).

    Equation: `loss-aggregation` `token-mean` $\frac{\sum_{i,t}m\ell}{\sum_{i,t}m}$, `seq-mean`
        $\frac1N\sum_i\frac{\sum_tm\ell}{\sum_tm}$, `seq-sum` $\frac1N\sum_{i,t}m\ell$, `constant`
        $\frac1{NL_{\max}}\sum_{i,t}m\ell$, `sum`
    Shapes: token_terms (B, T), mask (B, T) of booleans or 0/1 -> scalar. ``divisor`` replaces the denominator
        (tokens, N, or N L_max) by that of the whole optimiser batch, so that micro-batches add up to it.
    Raises: ValueError for an unknown reduction, a mask of another shape or with values other than 0 and 1.
    Source: bridging §1.6 and §2; deepseek (SFT, PPO and GRPO for LLMs); notes §10.5.
    Differs: the sources disagree about the divisor, so it is a switch (errata 2 and 77).
    """
    terms = as_tensor(token_terms)
    keep = kept_positions(mask, terms.shape, "aggregate")
    weights = aggregation_weights(keep, reduction, length=length, divisor=divisor)
    return (where(keep, terms, 0.0) * weights).sum()


@written("masked_mean", example=_example_mean)
def masked_mean(terms: Float[Array, "*B"], mask: Any) -> Float[Tensor, ""]:
    r"""The mean over the kept terms of any shape; 0 when none is kept.

    Equation: `ppo-masked-mean` $\frac{\sum_{b,t}m_t^{(b)}\ell_t^{(b)}}{\sum_{b,t}m_t^{(b)}}$
    Shapes: terms (...), mask of the same shape -> scalar
    Raises: ValueError for a mask of another shape or with values other than 0 and 1.
    Source: notes §10.5.
    Differs: indices of the mask as in the numerator (erratum 100); the number of terms, not of steps plus
        one, divides (erratum 75).
    """
    values = as_tensor(terms)
    keep = kept_positions(mask, values.shape, "masked_mean")
    return where(keep, values, 0.0).sum() * (1.0 / max(int(keep.sum()), 1))
