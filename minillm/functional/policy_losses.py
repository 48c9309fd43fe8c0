r"""The losses of GRPO and its relatives, from log-probs of sampled tokens: pure functions, to be minimised.

Shapes throughout: B responses of at most T tokens; ``mask`` (B, T) keeps the tokens that the policy wrote;
``advantages`` (B,) or (B, T). Everything but the current log-probs is data and receives no gradient.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, as_tensor, where
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of
from minillm.functional.clipping import (
    LEVELS,
    clip_range,
    clip_term,
    draw_log_ratios,
    dual_clip_term,
    ratios_at_level,
    sequence_ratio,
    zero_gradient_region,
)
from minillm.functional.frozen import Array, frozen, frozen_where, kept_positions
from minillm.functional.kl_estimators import ESTIMATORS, kl_estimate
from minillm.functional.reductions import REDUCTIONS, aggregate


class GRPOLoss(NamedTuple):
    """A loss and what to watch beside it; all but the first are plain numbers, means over the kept tokens."""

    loss: Tensor
    policy_loss: float
    kl: float  # the estimate that the loss used (k3 by default); NaN without a reference
    old_kl: float  # k3 of the policy that sampled, in units of nats per token: 0 in the first step on a batch
    mean_ratio: float
    clip_fraction_low: float
    clip_fraction_high: float
    entropy: float  # of the full next-token law where it was passed in; NaN otherwise
    sampled_entropy: float  # from the sampled tokens alone: a monitor, never a bonus (erratum 74)

    @property
    def clip_fraction(self) -> float:
        """Share of tokens on which the clip took the gradient away."""
        return self.clip_fraction_low + self.clip_fraction_high


def example_responses(rng: np.random.Generator) -> tuple[tuple, dict]:
    """Responses with ratios away from the clip bounds, one of them all masked, for gradient checks."""
    shape = [(3, 4), (2, 1), (1, 5)][rng.integers(3)]
    mask = np.arange(shape[1]) < rng.integers(1, shape[1] + 1, size=(shape[0], 1))
    mask[0] = shape[0] == 1
    logprobs = rng.uniform(-2.0, -0.5, size=shape)
    data = {"old_logprobs": logprobs - draw_log_ratios(rng, shape), "advantages": rng.normal(size=shape[0])}
    return (logprobs,), {**data, "mask": mask}


def _example_full(rng):
    (logprobs,), kwargs = example_responses(rng)
    switches = {
        "kl": ["k1", "k2", "k3"][rng.integers(3)],
        "reduction": REDUCTIONS[rng.integers(5)],
        "length": 6,
    }
    switches["kl_ratio"] = bool(rng.integers(2))
    return (logprobs,), {
        **kwargs,
        "ref_logprobs": logprobs + rng.normal(size=logprobs.shape),
        "beta": 0.1,
        **switches,
    }


def example_with_reference(rng: np.random.Generator) -> tuple[tuple, dict]:
    """The same with a reference policy."""
    (logprobs,), kwargs = example_responses(rng)
    return (logprobs,), {
        **kwargs,
        "ref_logprobs": logprobs + 0.3 * rng.normal(size=logprobs.shape),
        "beta": 0.1,
    }


@written("grpo_clip_objective", example=example_responses)
def grpo_clip_objective(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Array,
    mask: Any,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    level: str = "token",
    reduction: str = "seq-mean",
    **options: Any,
) -> Float[Tensor, ""]:
    r"""The clipped group objective, to be maximised.

    Equation: `grpo-clip` $\frac1G\sum_i\frac1{\lvert
        y_i\rvert}\sum_t\min(\rho_{i,t}A_i,\mathrm{clip}(\rho_{i,t},1-\varepsilon,1+\varepsilon)A_i)$
    Shapes: as in the module -> scalar. ``level="sequence"`` puts the response's ratio in place of the
        token's.
    Raises: ValueError if the shapes do not match or for an unknown level or reduction.
    Source: deepseek (GRPO); lecture06; bridging §2.2.
    Differs: named an objective (erratum 71); ratio per token by default (erratum 81).
    """
    keep = kept_positions(mask, logprobs.shape, "grpo_clip_objective")
    a = frozen_where(keep, advantages, "grpo_clip_objective", "advantages")
    ratio = ratios_at_level(logprobs, old_logprobs, keep, level)
    return aggregate(clip_term(ratio, a, clip_low, clip_high), keep, reduction, **options)


@written("grpo_loss", example=_example_full)
def grpo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Array,
    mask: Any,
    ref_logprobs: Float[Array, "B T"] | None = None,
    *,
    beta: float = 0.0,
    kl: str = "k3",
    kl_ratio: bool = False,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    level: str = "token",
    token_weights: Array | None = None,
    entropies: Float[Array, "B T"] | None = None,
    entropy_coef: float = 0.0,
    reduction: str = "seq-mean",
    length: int | None = None,
    divisor: float | None = None,
) -> GRPOLoss:
    r"""The GRPO loss with its diagnostics.

    ``kl_ratio`` multiplies the estimator by the importance ratio, which makes value and gradient those of the
    reverse divergence on samples of an older policy (k1 and k3). ``token_weights`` are those of
    `tis_weights`. ``divisor`` is the reduction's denominator over the whole optimiser batch, see
    `aggregation_divisor`.

    Equation: `grpo-loss` $-\frac1G\sum_i\frac1{\lvert
        y_i\rvert}\sum_t\big[\min(\rho_{i,t}A_i,\mathrm{clip}(\rho_{i,t})A_i)-\beta k_3\big]$
    Equation: `grpo-clip-higher` with ``clip_high`` wider than ``clip_low``
    Equation: `loss-aggregation` the divisor is ``reduction``
    Shapes: as in the module; ref_logprobs, token_weights, entropies (B, T) -> loss (scalar) and numbers
    Raises: ValueError if the shapes do not match, for an unknown switch, or if beta is not 0 without a
        reference.
    Source: deepseek (GRPO); lecture06; Shao et al. 2024.
    Differs: parameters are the policy's, and the KL term stands inside the average (erratum 82); reference
        and old policy are two arguments (erratum 76); the divisor is a switch (erratum 77).
    """
    require_one_of(level, LEVELS, "grpo_loss", "level")
    keep = kept_positions(mask, logprobs.shape, "grpo_loss")
    current = where(keep, as_tensor(logprobs), 0.0)
    old = frozen_where(keep, old_logprobs, "grpo_loss", "old_logprobs")
    a = frozen_where(keep, advantages, "grpo_loss", "advantages")
    ratio = ratios_at_level(current, old, keep, level)  # (B, T) or (B, 1)
    if dual_clip is None:
        term = clip_term(ratio, a, clip_low, clip_high)
    else:
        term = dual_clip_term(ratio, a, clip_low, clip_high, dual_clip)
    low, high = clip_range("grpo_loss", clip_low, clip_high)
    dead = zero_gradient_region(ratio, a, clip_low, clip_high) & (a != 0)
    clipped = (dead & (ratio.data < low), dead & (ratio.data > high))
    return penalised_loss(
        "grpo_loss", term, current, old, keep, clipped, ref_logprobs, beta=beta, kl=kl, kl_ratio=kl_ratio,
        token_weights=token_weights, entropies=entropies, entropy_coef=entropy_coef,
        reduction=reduction, length=length, divisor=divisor,
    )  # fmt: skip


def penalised_loss(
    name: str,
    term: Tensor,
    current: Tensor,
    old: np.ndarray,
    keep: np.ndarray,
    clipped: tuple[np.ndarray, np.ndarray],
    ref_logprobs: Array | None = None,
    *,
    beta: float = 0.0,
    kl: str = "k3",
    kl_ratio: bool = False,
    token_weights: Array | None = None,
    entropies: Array | None = None,
    entropy_coef: float = 0.0,
    **how: Any,
) -> GRPOLoss:
    """Minus the aggregated objective terms, plus the KL penalty, minus the entropy bonus; with diagnostics.

    ``current`` and ``old`` hold 0 at dropped tokens; ``how`` is the reduction. `grpo_loss` explains the rest.
    """
    require(beta == 0 or ref_logprobs is not None, name, "ref_logprobs", "given when beta is not 0", ref_logprobs)
    require(
        entropy_coef == 0 or entropies is not None,
        name,
        "entropies",
        "given when entropy_coef is not 0",
        entropies,
    )
    require_one_of(kl, ESTIMATORS, name, "kl")
    if token_weights is not None:
        term = term * frozen_where(keep, token_weights, name, "token_weights")
    loss = -aggregate(term, keep, **how)
    policy_loss = float(loss.item())
    log_ratio = current.data - old
    ratio = np.exp(log_ratio)
    mean_kl = mean_entropy = np.nan
    if ref_logprobs is not None:
        penalty = kl_estimate(current, frozen_where(keep, ref_logprobs, name, "ref_logprobs"), kl)
        if kl_ratio:
            penalty = (current - old).exp() * penalty
        mean_kl = _mean(penalty.data, keep)
        loss = loss + aggregate(penalty, keep, **how) * beta if beta else loss
    if entropies is not None:
        mean_entropy = _mean(frozen(entropies), keep)
        loss = loss - aggregate(entropies, keep, **how) * entropy_coef if entropy_coef else loss
    return GRPOLoss(
        loss=loss,
        policy_loss=policy_loss,
        kl=mean_kl,
        old_kl=_mean(np.expm1(log_ratio) - log_ratio, keep),
        mean_ratio=_mean(ratio, keep),
        clip_fraction_low=_mean(clipped[0], keep),
        clip_fraction_high=_mean(clipped[1], keep),
        entropy=mean_entropy,
        sampled_entropy=_mean(-ratio * current.data, keep),
    )


def _mean(values: np.ndarray, keep: np.ndarray) -> float:
    """The mean over kept tokens; 0 when none is kept."""
    return float(np.where(keep, values, 0).sum() / max(int(keep.sum()), 1))


@written("grpo_kl_objective", example=example_with_reference)
def grpo_kl_objective(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    mask: Any,
    ref_logprobs: Float[Array, "B T"],
    beta: float,
    kl: str = "k3",
) -> Float[Tensor, ""]:
    r"""The unclipped group objective with a divergence of whole responses, to be maximised.

    The divergence does not depend on the sampled response; it is estimated on the responses of the old
    policy, with the importance ratio, so that value and gradient (k1 and k3) are those of the reverse
    divergence in mean.

    Equation: `grpo-kl-objective` $\mathbb E_{y_i\sim\pi_{\rm old}}[\rho_iA_i-\beta D_{\rm
        KL}(\pi_\theta\Vert\pi_{\rm ref})]$
    Shapes: logprobs, old_logprobs, ref_logprobs, mask (B, T), advantages (B,) -> scalar
    Raises: ValueError if the shapes do not match or for an unknown estimator.
    Source: bridging §2.2 and §5.
    Differs: responses come from the old policy, whose ratio weighs them (erratum 63).
    """
    keep = kept_positions(mask, logprobs.shape, "grpo_kl_objective")
    a = frozen(advantages)
    require(a.shape == keep.shape[:1], "grpo_kl_objective", "advantages", f"of shape {keep.shape[:1]}", a)
    current = where(keep, as_tensor(logprobs), 0.0)
    ratio = sequence_ratio(current, old_logprobs, keep)  # (B,)
    reference = frozen_where(keep, ref_logprobs, "grpo_kl_objective", "ref_logprobs").sum(-1)
    penalty = kl_estimate(current.sum(-1), reference, kl)  # (B,)
    return (ratio * a - ratio * penalty * beta).sum() * (1.0 / max(len(a), 1))
