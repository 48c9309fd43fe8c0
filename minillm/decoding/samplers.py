r"""From logits to a token: the laws one may sample from, and drawing from them.

A sampler first turns the model's logits into the law that is sampled, by temperature and truncation in a fixed
order, and returns the log-probability of its choice *under that law*: the behaviour log-probability that an
importance ratio needs.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minillm.checks import require, require_positive


class Sampled(NamedTuple):
    """Chosen tokens and their log-probabilities under the law they were drawn from."""

    ids: Int[np.ndarray, " B"]
    logprobs: Float[np.ndarray, " B"]


def greedy(logits: Float[np.ndarray, "*B V"]) -> Int[np.ndarray, "*B"]:
    r"""The most likely token, the first of several equal ones.

    Equation: `greedy` $\arg\max_v\mathbf o_t[v]$
    Shapes: logits (..., V) -> (...)
    Source: notes §10.5.
    """
    return logits.argmax(-1)


def apply_temperature(logits: Float[np.ndarray, "*B V"], temperature: float) -> Float[np.ndarray, "*B V"]:
    r"""Logits of a flatter (T > 1) or sharper (T < 1) law.

    Equation: `sample-temperature` $p_i^{(T)}=e^{z_i/T}/\sum_je^{z_j/T}$
    Shapes: (..., V) -> (..., V)
    Raises: ValueError unless the temperature is positive.
    Source: notes §10.5.
    """
    require_positive(temperature, "apply_temperature", "the temperature")
    return logits if temperature == 1 else logits / logits.dtype.type(temperature)


def keep_top_k(logits: Float[np.ndarray, "*B V"], k: int) -> Float[np.ndarray, "*B V"]:
    r"""Exclude all but the k largest logits; of equal ones the first are kept.

    Equation: `sample-top-k` keep the $k$ largest, renormalise
    Shapes: (..., V) -> (..., V), minus infinity where excluded
    Raises: ValueError unless k is a positive integer; more than V keeps all.
    Source: notes §10.5.
    """
    require_positive(k, "keep_top_k", "k", integer=True)
    if k >= logits.shape[-1]:
        return logits
    return keep_first(logits, _descending(logits), np.arange(logits.shape[-1]) < k)


def keep_top_p(logits: Float[np.ndarray, "*B V"], p: float) -> Float[np.ndarray, "*B V"]:
    r"""Exclude all but the nucleus: the smallest set of most likely tokens with mass at least p.

    Equation: `sample-top-p` smallest $\mathcal S$ in descending order with $\sum_{\mathcal S}p_i\ge p_{\rm thr}$
    Shapes: (..., V) -> (..., V), minus infinity where excluded; at least one is kept
    Raises: ValueError unless 0 < p <= 1.
    Source: notes §10.5; Holtzman et al. 2020.
    """
    require(0 < p <= 1, "keep_top_p", "p", "in (0, 1]", p)
    if p == 1:
        return logits
    order = _descending(logits)
    probs = np.take_along_axis(probabilities(logits), order, -1)
    before = probs.cumsum(-1) - probs  # the mass of everything more likely
    return keep_first(logits, order, before < p)


def keep_min_p(logits: Float[np.ndarray, "*B V"], p: float) -> Float[np.ndarray, "*B V"]:
    r"""Exclude tokens whose probability is under a share of the largest one.

    Equation: `sample-penalties` min-p: keep $p_v\ge p_{\min}\max p$
    Shapes: (..., V) -> (..., V), minus infinity where excluded; at least one is kept
    Raises: ValueError unless 0 <= p <= 1.
    Source: topics #9; Nguyen et al. 2024.
    """
    require(0 <= p <= 1, "keep_min_p", "p", "in [0, 1]", p)
    if p == 0:
        return logits
    threshold = logits.max(-1, keepdims=True) + logits.dtype.type(np.log(p))
    return np.where(logits >= threshold, logits, -np.inf).astype(logits.dtype)


def truncate(
    logits: Float[np.ndarray, "*B V"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[np.ndarray, "*B V"]:
    r"""Logits of the law that is sampled: temperature, then top-k, then top-p, then min-p.

    Equation: `sample-combine` temperature → top-$k$ → top-$p$, each on the renormalised result of the one before
    Shapes: (..., V) -> (..., V), minus infinity where excluded
    Raises: ValueError for a setting out of range.
    Source: notes §10.5.
    """
    logits = apply_temperature(logits, temperature)
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    logits = logits if top_p is None else keep_top_p(logits, top_p)
    return logits if min_p is None else keep_min_p(logits, min_p)


def sample(
    logits: Float[np.ndarray, "B V"],
    uniforms: Float[np.ndarray, " B"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Sampled:
    r"""Draw one token a row by inverting the cumulative law at a uniform number; temperature 0 is greedy.

    Equation: `sample-behaviour-logprob` $\log\pi_{\rm beh}$ of the choice, after temperature and truncation
    Shapes: logits (B, V), uniforms (B,) in [0, 1) -> ids (B,), logprobs (B,)
    Raises: ValueError for a setting out of range; FloatingPointError for logits that are NaN or have no finite maximum.
    Source: notes §10.5.
    Differs: the log-probability is that of the law sampled, not of the model at T = 1 (erratum 45).
    """
    logits = keep_finite("sample", logits)
    if temperature == 0:
        return Sampled(greedy(logits), np.zeros(len(logits), logits.dtype))
    return draw(truncate(logits, temperature, top_k, top_p, min_p), uniforms)


def draw(kept: Float[np.ndarray, "B V"], uniforms: Float[np.ndarray, " B"]) -> Sampled:
    r"""Draw one token a row from the law with these logits, minus infinity where a token is excluded.

    Equation: `sample-behaviour-logprob` $\log\pi_{\rm beh}$ of the choice
    Shapes: kept (B, V), uniforms (B,) in [0, 1) -> ids (B,), logprobs (B,)
    Raises: ValueError unless there is one uniform number a row.
    Source: notes §10.5.
    """
    require(uniforms.shape == kept.shape[:1], "draw", "the uniform numbers", f"of shape {kept.shape[:1]}", uniforms)
    shifted = kept - kept.max(-1, keepdims=True)
    cumulative = np.exp(shifted).cumsum(-1, dtype=np.float64)  # (B, V)
    # An excluded token adds nothing, so the first entry above the threshold is never one.
    ids = (cumulative > uniforms[:, None] * cumulative[:, -1:]).argmax(-1)
    chosen = np.take_along_axis(shifted, ids[:, None], -1)[:, 0]
    return Sampled(ids, (chosen - np.log(cumulative[:, -1])).astype(kept.dtype))


def keep_finite(where: str, logits: np.ndarray) -> np.ndarray:
    """The logits, if every row has a finite maximum; NaN and infinity end here."""
    if not np.isfinite(logits.max(-1, initial=-np.inf)).all():
        raise FloatingPointError(f"{where}: every row of logits must have a finite maximum, got NaN or infinity.")
    return logits


def probabilities(logits: Float[np.ndarray, "*B V"]) -> Float[np.ndarray, "*B V"]:
    """Softmax of an array, 0 where a logit is minus infinity."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _descending(logits: np.ndarray) -> np.ndarray:
    return np.argsort(-logits, axis=-1, kind="stable")


def keep_first(logits: np.ndarray, order: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The logits with minus infinity except at those places of an order that are kept."""
    mask = np.zeros(logits.shape, bool)
    np.put_along_axis(mask, order, np.broadcast_to(kept, logits.shape), -1)
    return np.where(mask, logits, logits.dtype.type(-np.inf))
