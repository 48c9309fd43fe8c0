r"""Watching a policy move: token by token, and as a divergence from the policy that sampled."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require_positive
from minillm.functional.clipping import clip_term, importance_ratio, masked_log_ratio, zero_gradient_region
from minillm.functional.frozen import Array, frozen, kept_positions
from minillm.functional.policy_losses import example_responses
from minillm.functional.reductions import masked_mean


class TokenTrace(NamedTuple):
    """What PPO does to each token of one response."""

    logprob: np.ndarray
    ratio: np.ndarray
    advantage: np.ndarray
    clipped: np.ndarray
    term: np.ndarray


def ppo_token_trace(
    logprobs: Float[Array, " T"],
    old_logprobs: Float[Array, " T"],
    advantages: Float[Array, " T"],
    clip: float = 0.2,
) -> TokenTrace:
    r"""A response token by token: log-prob, ratio, advantage, whether the clip took its gradient, and its
    term.

    Equation: `ppo-per-token` $\log\pi,\ \rho_t,\ \hat A_t$, clip flag,
        $\min(\rho_t\hat A_t,\mathrm{clip}(\rho_t)\hat A_t)$
    Shapes: three (T,) -> five (T,)
    Raises: ValueError if the shapes differ.
    Source: topics #11.
    """
    ratio, a = importance_ratio(logprobs, old_logprobs).detach(), frozen(advantages)
    flags = zero_gradient_region(ratio, a, clip) & (a != 0)
    return TokenTrace(frozen(logprobs), ratio.data, a, flags, clip_term(ratio, a, clip).data)


class EarlyStop(NamedTuple):
    """The divergence of the current policy from the one that sampled, and whether it went too far."""

    kl: float
    stop: bool


def ppo_early_stop(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Any, target: float
) -> EarlyStop:
    r"""Whether to leave the epochs on a batch because the policy has moved far enough.

    Equation: `ppo-early-stop` $\hat D_{\rm KL}(\pi_{\rm old}\Vert\pi_\theta)=\overline{\rho-1-\log\rho}>$
        target
    Shapes: logprobs, old_logprobs, mask (B, T) -> number and decision
    Raises: ValueError if the shapes do not match or the target is not positive.
    Source: topics #10.
    """
    require_positive(target, "ppo_early_stop", "target")
    keep = kept_positions(mask, frozen(logprobs).shape, "ppo_early_stop")
    gap = masked_log_ratio(Tensor(frozen(logprobs)), old_logprobs, keep, "ppo_early_stop").data
    kl = float((np.expm1(gap) - gap).sum() / max(int(keep.sum()), 1))
    return EarlyStop(kl, kl > target)


def _example(rng):
    (logprobs,), kwargs = example_responses(rng)
    return (logprobs,), {"old_logprobs": kwargs["old_logprobs"], "mask": kwargs["mask"]}


@written("trpo_kl_sample", example=_example)
def trpo_kl_sample(logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Any) -> Float[Tensor, ""]:
    r"""TRPO's constraint as a mean over samples of the old policy.

    Equation: `trpo-kl-sample` $\mathbb E_{a\sim\pi_{\rm old}}[\log\pi_{\rm old}-\log\pi_\theta]=D_{\rm
        KL}(\pi_{\rm old}\Vert\pi_\theta)$
    Shapes: logprobs, old_logprobs, mask (B, T) -> scalar, mean over kept tokens
    Raises: ValueError if the shapes do not match.
    Source: notes §10.6.
    """
    keep = kept_positions(mask, logprobs.shape, "trpo_kl_sample")
    return masked_mean(-masked_log_ratio(logprobs, old_logprobs, keep, "trpo_kl_sample"), keep)
