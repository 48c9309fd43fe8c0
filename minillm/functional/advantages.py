r"""Advantages from groups of responses to one prompt, and their normalisation: plain arrays, frozen data.

Rewards come as (..., G): one row for each prompt, G responses in it, at least one.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from minillm.checks import require, require_one_of, require_positive
from minillm.functional.frozen import Array, frozen, kept_positions

Groups = Float[np.ndarray, "*P G"]
SAME_REWARD = 1e-8


class GroupStats(NamedTuple):
    """Mean and standard deviation of the rewards of every group."""

    mean: np.ndarray
    std: np.ndarray


def _rewards(where: str, rewards: Any) -> np.ndarray:
    array = frozen(rewards)
    array = array if array.dtype.kind == "f" else array.astype(np.float64)
    shaped = array.ndim >= 1 and array.shape[-1] >= 1
    require(shaped, where, "rewards", "of shape (..., G) with G at least 1", array)
    require(bool(np.isfinite(array).all()), where, "rewards", "finite", "a reward that is NaN or infinite")
    return array


def group_baseline(rewards: Real[Array, "*P G"]) -> Float[np.ndarray, "*P 1"]:
    r"""The mean reward of every group: an estimate of the prompt's value.

    Equation: `group-baseline` $b=\frac1G\sum_ir_i$
    Shapes: rewards (..., G) -> (..., 1)
    Raises: ValueError for a reward that is not finite.
    Source: bridging §2.1; deepseek (GRPO); lecture06.
    Differs: unbiased for the prompt's value only, not for later tokens (erratum 79).
    """
    return _rewards("group_baseline", rewards).mean(-1, keepdims=True)


def group_stats(rewards: Real[Array, "*P G"], ddof: int = 0) -> GroupStats:
    r"""Mean and standard deviation of every group.

    Equation: `group-stats` $\mu=\frac1G\sum_jR_j,\ s^2=\frac1G\sum_j(R_j-\mu)^2$
    Shapes: rewards (..., G) -> two of (..., 1); ``ddof=1`` divides by G - 1
    Raises: ValueError for a reward that is not finite, or if G does not exceed ddof.
    Source: lecture06 (GRPO).
    """
    r = _rewards("group_stats", rewards)
    require(r.shape[-1] > ddof, "group_stats", "the group size", f"more than ddof = {ddof}", r.shape[-1])
    return GroupStats(r.mean(-1, keepdims=True), r.std(-1, keepdims=True, ddof=ddof))


def grpo_advantage_mean(rewards: Real[Array, "*P G"]) -> Groups:
    r"""Reward minus group mean; its policy gradient is (G - 1)/G of the true one.

    Equation: `grpo-advantage-mean` $A_i=r_i-b$
    Equation: `grpo-100-example` 100 answers with a share $p$ right: $1-p$ and $-p$
    Shapes: rewards (..., G) -> (..., G)
    Raises: ValueError for a reward that is not finite.
    Source: bridging §2.1; deepseek (grandparents 4/4); Liu et al. 2025 (Dr. GRPO).
    """
    return _rewards("grpo_advantage_mean", rewards) - group_baseline(rewards)


def grpo_advantage_std(rewards: Real[Array, "*P G"], ddof: int = 0, eps: float = 1e-6) -> Groups:
    r"""Reward standardised within its group; equal rewards give 0.

    Equation: `grpo-advantage-std` $A_i=\frac{r_i-\mathrm{mean}(\mathbf r)}{\mathrm{std}(\mathbf
        r)+\varepsilon_0}$
    Shapes: rewards (..., G) -> (..., G)
    Raises: ValueError for a reward that is not finite, if G does not exceed ddof, or for a negative eps.
    Source: deepseek (GRPO); lecture06; Shao et al. 2024.
    Differs: one source has no stabiliser, another calls it as it calls the clip range (erratum 78).
        Population standard deviation by default; libraries often take ``ddof=1`` and an eps of 1e-4.
    """
    require_positive(eps, "grpo_advantage_std", "eps", zero_ok=True)
    stats = group_stats(rewards, ddof)
    centred = _rewards("grpo_advantage_std", rewards) - stats.mean
    return np.divide(centred, stats.std + eps, out=np.zeros_like(centred), where=stats.std + eps > 0)


def rloo_advantage(rewards: Real[Array, "*P G"]) -> Groups:
    r"""Reward minus the mean of the *other* responses: exactly unbiased.

    Equation: `rloo` $A_i=r_i-\frac1{G-1}\sum_{j\ne i}r_j=\frac G{G-1}(r_i-b)$
    Shapes: rewards (..., G) with G at least 2 -> (..., G)
    Raises: ValueError for a reward that is not finite or a group of one.
    Source: Ahmadian et al. 2024.
    Differs: the remedy for the factor (G - 1)/G of erratum 79.
    """
    r = _rewards("rloo_advantage", rewards)
    size = r.shape[-1]
    require(size >= 2, "rloo_advantage", "the group size", "at least 2", size)
    return size / (size - 1) * grpo_advantage_mean(r)


ADVANTAGES = ("std", "mean", "rloo", "batch-std")


def group_advantage(rewards: Real[Array, "*P G"], kind: str = "std", ddof: int = 0, eps: float = 1e-6) -> Groups:
    r"""One of the group advantages by name; ``batch-std`` divides by the standard deviation of all rewards
    together.

    Equation: `grpo-advantage-std` `kind="std"` (the default)
    Equation: `grpo-advantage-mean` `kind="mean"`
    Equation: `rloo` `kind="rloo"`
    Shapes: rewards (..., G) -> (..., G)
    Raises: ValueError for another name or a reward that is not finite.
    Source: bridging §2.1; deepseek; lecture06.
    """
    require_one_of(kind, ADVANTAGES, "group_advantage", "kind")
    if kind == "std":
        return grpo_advantage_std(rewards, ddof, eps)
    if kind == "rloo":
        return rloo_advantage(rewards)
    centred = grpo_advantage_mean(rewards)
    return centred if kind == "mean" else centred / (frozen(rewards).std(ddof=ddof) + eps)


def dead_groups(rewards: Real[Array, "*P G"], tolerance: float = SAME_REWARD) -> Bool[np.ndarray, "*P"]:
    r"""Groups whose rewards are all equal: nothing to learn from, the policy term has no gradient.

    Equation: `grpo-zero-variance` $A_i=0$ for all $i$; the share of such groups is what to report
    Shapes: rewards (..., G) -> (...) of booleans; the mean of it is the share
    Raises: ValueError for a reward that is not finite.
    Source: erratum 78.
    Differs: equal up to a tolerance, so that 0.1 + 0.2 counts as 0.3.
    """
    r = _rewards("dead_groups", rewards)
    return np.asarray(r.max(-1) - r.min(-1) <= tolerance)


def expected_dead_share(p: float, group_size: int) -> float:
    r"""The share of dead groups to expect when each response is right with probability p.

    Equation: `grpo-zero-variance` $p^G+(1-p)^G$ for rewards of 0 and 1
    Shapes: numbers
    Raises: ValueError for p outside [0, 1] or a group size that is not a positive integer.
    Source: erratum 78.
    """
    require(0 <= p <= 1, "expected_dead_share", "p", "in [0, 1]", p)
    require_positive(group_size, "expected_dead_share", "group_size", integer=True)
    return float(p**group_size + (1 - p) ** group_size)


def live_groups(rewards: Real[Array, "P G"], tolerance: float = SAME_REWARD) -> Int[np.ndarray, " n"]:
    r"""The prompts to keep when dead groups are dropped and replaced by further samples.

    Equation: `grpo-dynamic-sampling` keep a prompt iff $\mathrm{std}(\mathbf r)>0$; kept share
        $1-p^G-(1-p)^G$ for 0/1 rewards
    Shapes: rewards (P, G) -> indices of the kept prompts, in order
    Raises: ValueError for a reward that is not finite.
    Source: Yu et al. 2025 (DAPO).
    """
    return np.flatnonzero(~dead_groups(rewards, tolerance))


def advantage_whitening(
    advantages: Float[Array, "*B"], mask: Any, eps: float = 1e-8, ddof: int = 0, shift_mean: bool = True
) -> Float[np.ndarray, "*B"]:
    r"""Advantages with mean 0 and standard deviation 1 over the real tokens of the batch.

    Equation: `advantage-whitening` $(\hat A-\mu)/(s+\varepsilon_0)$
    Shapes: advantages (...), mask of that shape -> (...); 0 where the mask drops them, ``shift_mean=False``
        only scales
    Raises: ValueError for a mask of another shape.
    Source: topics #10.
    Differs: libraries disagree on ddof and eps, which are therefore arguments.
    """
    a = frozen(advantages)
    keep = kept_positions(mask, a.shape, "advantage_whitening")
    real = a[keep]
    if real.size <= ddof:
        return np.zeros_like(a)
    shift = real.mean() if shift_mean else 0.0
    return np.where(keep, (np.where(keep, a, 0) - shift) / (real.std(ddof=ddof) + eps), 0).astype(a.dtype)


def hybrid_advantage(
    group: Float[Array, " B"], token: Float[Array, "B T"], alpha: float = 0.5
) -> Float[np.ndarray, "B T"]:
    r"""A mixture of the group's advantage of a response and the critic's of each of its tokens.

    Equation: `grpo-gae-hybrid` $\hat A=\alpha A^{\rm group}+(1-\alpha)\hat A^{\rm GAE}$
    Shapes: group (B,), token (B, T) -> (B, T)
    Raises: ValueError if the numbers of responses differ or alpha is outside [0, 1].
    Source: bridging §4.3.
    """
    require(0 <= alpha <= 1, "hybrid_advantage", "alpha", "in [0, 1]", alpha)
    per_response, per_token = frozen(group), frozen(token)
    fits = per_token.ndim == 2 and per_response.shape == per_token.shape[:1]
    require(fits, "hybrid_advantage", "the group advantages", f"of shape {per_token.shape[:1]}", per_response)
    return alpha * per_response[:, None] + (1 - alpha) * per_token
