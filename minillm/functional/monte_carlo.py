r"""Estimating expectations from samples, with standard errors, and drawing the samples.

Everything here works on plain arrays; randomness comes in as a generator.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minillm.checks import require, require_positive


class Estimate(NamedTuple):
    """An estimated number and its standard error."""

    value: float
    standard_error: float


def _samples(where: str, what: str, values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    require(array.ndim == 1 and array.size > 0, where, what, "of shape (n,) with n at least 1", array)
    return array


def expectation(p: Float[np.ndarray, " n"], f: Float[np.ndarray, " n"]) -> float:
    r"""The exact mean of f under p.

    Equation: `expectation-mc` $\mathbb E_p[f]=\sum_xp(x)f(x)$
    Shapes: p (n,), f (n,) -> number
    Source: topics #3.
    """
    return float(np.dot(p, f))


def expectation_mc(f: Float[np.ndarray, " n"]) -> Estimate:
    r"""The mean of f over samples and its standard error, which falls as one over the root of their number.

    Equation: `expectation-mc` $\mathbb E_p[f]\approx\frac1n\sum_if(x_i),\ x_i\sim p$
    Shapes: f at n samples (n,) -> estimate; the error is infinite for n = 1
    Raises: ValueError for no samples.
    Source: topics #3.
    """
    values = _samples("expectation_mc", "f", f)
    n = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.inf)


def variance_second_moment(x: Float[np.ndarray, " n"]) -> float:
    r"""Population variance as second moment minus squared mean: exact on paper, cancelling in floating point.

    Equation: `variance-second-moment` $\mathrm{Var}(x)=\mathbb Ex^2-(\mathbb Ex)^2$
    Shapes: x (n,) -> number
    Raises: ValueError for no samples.
    Source: notes §3.1 (3).
    """
    values = _samples("variance_second_moment", "x", x)
    return float(np.mean(values**2) - np.mean(values) ** 2)


def importance_sampling(
    f: Float[np.ndarray, " n"], log_p: Float[np.ndarray, " n"], log_q: Float[np.ndarray, " n"]
) -> Estimate:
    r"""The mean of f under p from samples of q, weighted by the ratio of the two laws.

    Equation: `importance-sampling` $\mathbb E_p[f]=\mathbb E_q[\frac pqf]$, with $q>0$ wherever $pf\ne0$
    Shapes: f, log p and log q at the samples of q (n,) -> estimate
    Raises: ValueError if a sample has q = 0: it cannot have come from q.
    Source: notes §10.6 and (17).
    """
    values = _samples("importance_sampling", "f", f)
    possible = bool(np.all(np.asarray(log_q) > -np.inf))
    require(possible, "importance_sampling", "log_q", "finite at samples drawn from q", np.asarray(log_q).tolist())
    return expectation_mc(np.exp(np.asarray(log_p) - np.asarray(log_q)) * values)


def self_normalised_importance_sampling(f: Float[np.ndarray, " n"], log_w: Float[np.ndarray, " n"]) -> Estimate:
    r"""The same with weights known up to a constant: consistent, with a bias that falls as one over their
    number.

    Equation: `self-normalised-is` $\sum_i\frac{w_i}{\sum_jw_j}f(y_i),\ w_i\propto\frac{p(y_i)}{q(y_i)},\
        y_i\sim q$
    Shapes: f and log-weights at the samples (n,) -> estimate; the error is the delta method's
    Raises: ValueError if all weights are zero.
    Source: notes §10.9.
    """
    values, log_weights = (
        _samples("self_normalised_importance_sampling", "f", f),
        _samples("self_normalised_importance_sampling", "log_w", log_w),
    )
    top = float(log_weights.max())
    require(np.isfinite(top), "self_normalised_importance_sampling", "the largest log-weight", "finite", top)
    weights = np.exp(log_weights - top)
    weights /= weights.sum()
    value = float(weights @ values)
    return Estimate(value, float(np.sqrt(np.sum((weights * (values - value)) ** 2))))


def sample_inverse_cdf(p: Float[np.ndarray, " n"], size: int, rng: np.random.Generator) -> Int[np.ndarray, " size"]:
    r"""Draw categories by where a uniform number falls among the cumulated probabilities.

    Equation: `sampling-algorithms` inverse CDF: $x=\min\{k:\sum_{j\le k}p_j>U\}$
    Shapes: p (n,) -> (size,)
    Source: topics #9.
    """
    edges = np.cumsum(p)
    draws = np.searchsorted(edges / edges[-1], rng.random(size), side="right")
    return np.minimum(draws, np.flatnonzero(p)[-1])  # rounding may leave the last edge below 1


def sample_gumbel_max(z: Float[np.ndarray, " n"], size: int, rng: np.random.Generator) -> Int[np.ndarray, " size"]:
    r"""Draw from softmax(z) without computing it: the largest of logits plus Gumbel noise.

    Equation: `sampling-algorithms` Gumbel-max: $\arg\max_i(z_i+g_i),\ g_i=-\log(-\log U_i)$
    Shapes: z (n,) -> (size,)
    Source: topics #9.
    """
    return (np.asarray(z) + rng.gumbel(size=(size, len(z)))).argmax(-1)


def sample_rejection(
    p: Float[np.ndarray, " n"],
    q: Float[np.ndarray, " n"],
    envelope: float,
    size: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, " size"]:
    r"""Draw from p by proposing from q and accepting with probability p / (M q).

    Equation: `sampling-algorithms` rejection: accept $y\sim q$ if $U<\frac{p(y)}{Mq(y)}$, where $p\le Mq$
    Shapes: p (n,), q (n,) -> (size,); on average M proposals a draw
    Raises: ValueError if M q does not lie above p.
    Source: topics #9.
    """
    covers = bool(np.all(p <= envelope * q * (1 + 1e-12)))
    require(covers, "sample_rejection", "the envelope", "at least the largest p / q", envelope)
    accepted = np.empty(0, np.int64)
    while len(accepted) < size:
        proposals = sample_inverse_cdf(q, 2 * int(envelope * size) + 16, rng)
        keep = rng.random(len(proposals)) * envelope * q[proposals] < p[proposals]
        accepted = np.concatenate([accepted, proposals[keep]])
    return accepted[:size]


def sample_metropolis_hastings(
    log_p: Callable[[int], float],
    propose: Float[np.ndarray, "n n"],
    start: int,
    size: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, " size"]:
    r"""A Markov chain whose long-run law is p, known up to a constant.

    Equation: `sampling-algorithms` Metropolis-Hastings: accept $y\sim q(\cdot\mid x)$ with probability
        $\min\big(1,\frac{p(y)\,q(x\mid y)}{p(x)\,q(y\mid x)}\big)$
    Shapes: propose (n, n), rows q(. | x) -> (size,) states, dependent from one to the next
    Raises: ValueError if the start is impossible under p.
    Source: topics #9.
    """
    require_positive(size, "sample_metropolis_hastings", "size", integer=True)
    state, level = start, log_p(start)
    require(level > -np.inf, "sample_metropolis_hastings", "the start", "possible under p", start)
    chain = np.empty(size, np.int64)
    for i in range(size):
        candidate = int(rng.choice(len(propose), p=propose[state]))
        new_level = log_p(candidate)
        if np.log(rng.random()) < new_level - level + np.log(propose[candidate, state]) - np.log(
            propose[state, candidate]
        ):
            state, level = candidate, new_level
        chain[i] = state
    return chain
