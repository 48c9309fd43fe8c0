r"""PPO: actor and bonuses, as objectives to be maximised and losses to be minimised.

The difference to GRPO: advantages come from a critic, one for each token, and the divergence from the
reference is usually paid in the reward (`kl_shaped_reward`), not in the loss.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, as_tensor, where
from minillm.autograd.registry import written
from minillm.checks import require
from minillm.functional.clipping import masked_log_ratio
from minillm.functional.frozen import Array, frozen, frozen_where, kept_positions
from minillm.functional.information import entropy_from_logits, kl_token_exact
from minillm.functional.policy_losses import example_responses, grpo_clip_objective
from minillm.functional.reductions import aggregate, masked_mean


def _example_logits(rng):
    mask = rng.random((2, 3)) < 0.7
    return (rng.normal(size=(2, 3, 4)),), {"mask": mask}


def _example_kl_loss(rng):
    (logprobs,), kwargs = example_responses(rng)
    logits, ref = rng.normal(size=(2, *logprobs.shape, 4))
    direction = ["reverse", "forward"][rng.integers(2)]
    return (logprobs, logits), {**kwargs, "ref_logits": ref, "direction": direction, "beta": 0.2}


def _example_total(rng):
    return tuple(np.array(x) for x in rng.normal(size=4)), {"kl_coef": 0.1}


@written("surrogate_objective", example=example_responses)
def surrogate_objective(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], advantages: Array, mask: Any
) -> Float[Tensor, ""]:
    r"""The importance-sampled surrogate, to be maximised near the policy that sampled.

    Equation: `surrogate-objective` $\mathbb E_{(s,a)\sim\pi_{\rm old}}[\rho\,A^{\pi_{\rm old}}]$
    Shapes: logprobs, old_logprobs, mask (B, T), advantages (B, T) or (B,) -> scalar, mean over kept tokens
    Raises: ValueError if the shapes do not match.
    Source: deepseek; notes §10.6.
    Differs: samples and advantages belong to the old policy (erratum 63).
    """
    keep = kept_positions(mask, logprobs.shape, "surrogate_objective")
    a = frozen_where(keep, advantages, "surrogate_objective", "advantages")
    return masked_mean(masked_log_ratio(logprobs, old_logprobs, keep, "surrogate_objective").exp() * a, keep)


@written("ppo_clip_objective", example=example_responses)
def ppo_clip_objective(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Array,
    mask: Any,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    reduction: str = "token-mean",
    **options: Any,
) -> Float[Tensor, ""]:
    r"""The clipped surrogate, to be maximised.

    Equation: `ppo-clip` $\mathbb E[\min(\rho_t\hat A_t,\mathrm{clip}(\rho_t,1-\varepsilon,1+\varepsilon)\hat
        A_t)]$
    Equation: `ppo-degenerate` $\pi_{\rm old}=\pi_\theta$: the clip is idle and the gradient is the policy
        gradient
    Shapes: logprobs, old_logprobs, mask (B, T), advantages (B, T) or (B,) -> scalar
    Raises: ValueError if the shapes do not match or for an unknown reduction.
    Source: lecture06; notes §10.6; bridging §2.2.
    Differs: an objective (erratum 71); the mean divides by the number of terms (erratum 75).
    """
    return grpo_clip_objective(
        logprobs, old_logprobs, advantages, mask, clip_low, clip_high, reduction=reduction, **options
    )


@written("ppo_lm_loss", example=example_responses)
def ppo_lm_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Array,
    mask: Any,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    reduction: str = "token-mean",
    **options: Any,
) -> Float[Tensor, ""]:
    r"""PPO's actor loss for responses of a language model, to be minimised.

    Equation: `ppo-lm-loss` $-\mathbb E\big[\frac1{\lvert y\rvert}\sum_t\min(\cdot)\big]$ with
        ``reduction="seq-mean"``; token mean by default
    Shapes: logprobs, old_logprobs, mask (B, T), advantages (B, T) or (B,) -> scalar
    Raises: ValueError if the shapes do not match or for an unknown reduction.
    Source: deepseek (PPO for LLMs); notes §10.5.
    Differs: the documents weigh lengths differently (erratum 77); the old policy is not the reference
        (erratum 76).
    """
    return -ppo_clip_objective(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, reduction, **options)


@written("entropy_bonus", example=_example_logits)
def entropy_bonus(
    logits: Float[Tensor, "B T V"], mask: Any, reduction: str = "token-mean", **options: Any
) -> Float[Tensor, ""]:
    r"""Mean entropy of the next-token laws, to be added to an objective.

    Equation: `entropy-bonus` $\mathcal H(\pi_\theta(\cdot\mid s))=-\sum_a\pi_\theta\log\pi_\theta$
    Shapes: logits (B, T, V), mask (B, T) -> scalar
    Raises: ValueError if the shapes do not match or for an unknown reduction.
    Source: notes §10.6; lecture06 (entropy).
    Differs: summed over the vocabulary; the mean of minus the sampled log-probs has a gradient of mean zero
        (erratum 74).
    """
    keep = kept_positions(mask, logits.shape[:2], "entropy_bonus")
    return aggregate(entropy_from_logits(where(keep[..., None], logits, 0.0)), keep, reduction, **options)


@written("ppo_kl_loss", example=_example_kl_loss)
def ppo_kl_loss(
    logprobs: Float[Tensor, "B T"],
    logits: Float[Tensor, "B T V"],
    old_logprobs: Float[Array, "B T"],
    advantages: Array,
    mask: Any,
    ref_logits: Float[Array, "B T V"],
    beta: float,
    direction: str = "reverse",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    reduction: str = "token-mean",
) -> Float[Tensor, ""]:
    r"""PPO with the divergence from the reference as a penalty over the whole vocabulary, to be minimised.

    Equation: `ppo-kl-loss` $-\mathcal L^{\rm PPO}+\beta\,\mathbb E_t[D_{\rm KL}(\pi_\theta(\cdot\mid
        s_t)\Vert\pi_{\rm ref}(\cdot\mid s_t))]$
    Equation: `ppo-kl-orig` with ``direction="forward"``
        $\mathbb E_{s_t}[D_{\rm KL}(\pi_{\rm ref}\Vert\pi_\theta)]$
    Shapes: logprobs, old_logprobs, mask (B, T), logits, ref_logits (B, T, V), advantages (B, T) or (B,) ->
        scalar
    Raises: ValueError if the shapes do not match, or for an unknown direction or reduction.
    Source: notes §10.7; lecture06 (KL penalty).
    Differs: the documents disagree on the direction; reverse by default (erratum 4).
    """
    keep = kept_positions(mask, logprobs.shape, "ppo_kl_loss")
    policy = where(keep[..., None], logits, 0.0)
    reference = as_tensor(np.where(keep[..., None], frozen(ref_logits), 0).astype(policy.dtype))
    penalty = aggregate(kl_token_exact(policy, reference, direction), keep, reduction)
    loss = ppo_lm_loss(logprobs, old_logprobs, advantages, keep, clip_low, clip_high, reduction)
    return loss + penalty * beta


@written("ppo_total_loss", example=_example_total)
def ppo_total_loss(
    actor_objective: Float[Tensor, ""],
    critic_loss_value: Float[Tensor, ""],
    entropy: Float[Tensor, ""],
    kl: Float[Tensor, ""] | None = None,
    critic_coef: float = 0.5,
    entropy_coef: float = 0.01,
    kl_coef: float = 0.0,
) -> Float[Tensor, ""]:
    r"""The negative of PPO's total objective, to be minimised.

    Equation: `ppo-total` $-\big(\mathcal L^{\rm actor}-c_v\mathcal L^{\rm critic}+c_e\mathcal L^{\rm
        entropy}-w_2\mathrm{KL}\big)$
    Shapes: scalars -> scalar
    Source: notes §10.5 and §10.6; lecture06 (final objective).
    Differs: every part is a mean over real tokens (erratum 75).
    """
    total = actor_objective - critic_loss_value * critic_coef + entropy * entropy_coef
    return -total if kl is None else -(total - kl * kl_coef)


def kl_shaped_reward(
    scores: Float[Array, " B"],
    old_logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Any,
    beta: float,
) -> Float[np.ndarray, "B T"]:
    r"""Rewards for every token: the score on the last one, and a price for being likelier than the reference.

    Equation: `kl-shaped-reward` $r_t=-\beta\,\mathrm{sg}[\log\pi_{\rm old}-\log\pi_{\rm
        ref}]+\mathbf1\{t=T\}R_\phi(x,y)$
    Shapes: scores (B,), old_logprobs, ref_logprobs, mask (B, T) -> (B, T), an array: frozen at roll-out
    Raises: ValueError if the shapes do not match.
    Source: notes §10.5; deepseek.
    Differs: computed once, from the policy that sampled (erratum 69); negative where that policy is likelier
        than the reference (erratum 70).
    """
    keep = kept_positions(mask, frozen(old_logprobs).shape, "kl_shaped_reward")
    final = frozen(scores)
    require(final.shape == keep.shape[:1], "kl_shaped_reward", "scores", f"of shape {keep.shape[:1]}", final)
    old = frozen_where(keep, old_logprobs, "kl_shaped_reward", "old_logprobs")
    rewards = -beta * (old - frozen_where(keep, ref_logprobs, "kl_shaped_reward", "ref_logprobs"))
    rows = np.flatnonzero(keep.any(-1))
    last = keep.shape[1] - 1 - keep[rows, ::-1].argmax(-1)
    rewards[rows, last] += final[rows]
    return rewards


def rlhf_objective(scores: Float[Array, " B"], divergence: Float[Array, " B"], beta: float) -> float:
    r"""Mean score minus the price of the divergence: what RLHF maximises, as a monitor.

    Equation: `rlhf-objective` $\mathbb E[R_\phi(x,y)-\beta D_{\rm KL}(\pi_\theta(\cdot\mid x)\Vert\pi_{\rm
        ref}(\cdot\mid x))]$
    Shapes: scores (B,), divergence of each prompt's response law (B,) -> number
    Source: notes (12); deepseek; lecture06.
    Differs: the divergence is of the laws and does not depend on the sampled response (erratum 103).
    """
    return float(np.mean(frozen(scores) - beta * frozen(divergence)))
