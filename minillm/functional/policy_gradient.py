r"""REINFORCE and its relatives as surrogate losses: functions whose gradient is the policy gradient.

Only the gradient of these means something, and only with the sampling law and the weights frozen, which the
functions see to. Their value is not a measure of progress.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, as_tensor
from minillm.autograd.registry import written
from minillm.checks import require
from minillm.functional.frozen import Array, frozen, frozen_where, kept_positions
from minillm.functional.reductions import aggregate
from minillm.functional.returns import return_discounted
from minillm.functional.softmax import softmax


def _example_scores(rng):
    return (rng.normal(size=[(4,), (2, 3)][rng.integers(2)]),), {}


def _example(rng):
    shape = [(3, 4), (2, 1)][rng.integers(2)]
    mask = np.arange(shape[1]) < rng.integers(0, shape[1] + 1, size=(shape[0], 1))
    return (rng.normal(size=shape),), {"advantages": rng.normal(size=shape), "mask": mask}


def _example_per_response(rng):
    args, kwargs = _example(rng)
    return args, {"scores": rng.normal(size=len(args[0])), "mask": kwargs["mask"]}


def _example_rewards(rng):
    args, kwargs = _example(rng)
    return args, {"rewards": kwargs["advantages"], "mask": kwargs["mask"], "gamma": 0.9}


@written("softmax_scores", example=_example_scores)
def softmax_scores(logits: Float[Tensor, "*B n"]) -> Float[Tensor, "*B n n"]:
    r"""The score of every action of a softmax policy: the gradient of its log-probability by the logits.

    Equation: `log-derivative-trick` $\nabla p_\theta=p_\theta\nabla\log p_\theta$
    Equation: `score-function-zero-mean`
        $\mathbb E_{a\sim\pi_\theta}[\nabla_\theta\log\pi_\theta(a\mid s)]=0$, with
        $\nabla_z\log\pi(a)=e_a-\pi$
    Shapes: logits (..., n) -> (..., n, n), row a is the score of action a
    Source: notes §10.6.
    """
    return np.eye(logits.shape[-1], dtype=logits.dtype) - softmax(logits).unsqueeze(-2)


@written("pg_surrogate_loss", example=_example)
def pg_surrogate_loss(
    logprobs: Float[Array, "B T"], advantages: Array, mask: Any, reduction: str = "seq-sum", **options: Any
) -> Float[Tensor, ""]:
    r"""Minus the log-probs weighted by frozen advantages; its gradient is minus the policy gradient.

    Equation: `pg-surrogate-loss` $-\mathbb
        E_{\mathrm{sg}[\pi_\theta]}\big[\sum_t\mathrm{sg}[A_t]\log\pi_\theta(a_t\mid s_t)\big]$
    Shapes: logprobs (B, T) of sampled actions, advantages (B, T) or (B,), mask (B, T) -> scalar
    Raises: ValueError if the shapes do not match or for an unknown reduction.
    Source: deepseek (hacky loss); notes §10.6.
    Differs: right only with the sampling law and the advantages frozen, which is done here (erratum 62).
    """
    terms = as_tensor(logprobs)
    keep = kept_positions(mask, terms.shape, "pg_surrogate_loss")
    weights = frozen_where(keep, advantages, "pg_surrogate_loss", "advantages")
    return aggregate(-terms * weights, keep, reduction, **options)


@written("reinforce_loss", example=_example_per_response)
def reinforce_loss(
    logprobs: Float[Array, "B T"], scores: Float[Array, " B"], mask: Any, baseline: float = 0.0
) -> Float[Tensor, ""]:
    r"""REINFORCE: every action of an episode is credited with the episode's whole return.

    Equation: `reinforce` $\nabla J=\mathbb E_\tau\big[\sum_t\nabla\log\pi_\theta(a_t\mid s_t)\,\mathcal
        R(\tau)\big]$
    Shapes: logprobs (B, T), scores (B,), mask (B, T) -> scalar, minus the objective's surrogate
    Raises: ValueError if the shapes do not match.
    Source: notes §10.6 (A).
    Differs: the dynamics drop out because their log-probability does not depend on the policy (erratum 65).
    """
    returns = frozen(scores)
    require(
        returns.shape == logprobs.shape[:1],
        "reinforce_loss",
        "scores",
        f"of shape {logprobs.shape[:1]}",
        returns,
    )
    return pg_surrogate_loss(logprobs, returns - baseline, mask)


@written("reinforce_to_go_loss", example=_example_rewards)
def reinforce_to_go_loss(
    logprobs: Float[Array, "B T"],
    rewards: Float[Array, "B T"],
    mask: Any,
    gamma: float = 1.0,
    baselines: Array | None = None,
    discount_weighting: bool = True,
) -> Float[Tensor, ""]:
    r"""REINFORCE with what an action could still influence: the return from its step on.

    Equation: `reinforce-to-go` $\nabla J=\mathbb E_\tau\big[\sum_t\gamma^t\nabla\log\pi_\theta(a_t\mid
        s_t)\,G_t\big]$
    Equation: `baseline-invariance` $\mathbb E[\nabla\log\pi(a\mid s)\,b(s)]=0$, so ``baselines`` change no
        mean
    Equation: `pg-q-form` the same with $Q^\pi(s_t,a_t)=\mathbb E[G_t\mid s_t,a_t]$ in place of $G_t$
    Shapes: logprobs, rewards, mask (B, T), baselines (B, T) per state -> scalar, minus the objective's
        surrogate
    Raises: ValueError if the shapes do not match.
    Source: notes §10.6 (14).
    Differs: the term of step t carries the discount to the power t; without it (``discount_weighting=False``)
        the gradient is exact for a discount of 1 only (erratum 64).
    """
    keep = kept_positions(mask, logprobs.shape, "reinforce_to_go_loss")
    paid = frozen_where(keep, rewards, "reinforce_to_go_loss", "rewards")
    credit = return_discounted(paid, gamma)  # (B, T)
    if baselines is not None:
        credit = credit - frozen_where(keep, baselines, "reinforce_to_go_loss", "baselines")
    if discount_weighting:
        credit = credit * gamma ** np.arange(keep.shape[-1])
    return pg_surrogate_loss(logprobs, credit, keep)


@written("grpo_vanilla_pg_loss", example=_example)
def grpo_vanilla_pg_loss(
    logprobs: Float[Array, "B T"], advantages: Array, mask: Any, reduction: str = "seq-sum", **options: Any
) -> Float[Tensor, ""]:
    r"""The group advantage in plain policy gradient: no ratio and no clip, one update per batch of responses.

    Equation: `grpo-vanilla-pg` $\nabla\mathcal L=-\mathbb E\big[\sum_tA_i\nabla\log\pi_\theta(y_{i,t}\mid
        s_{i,t})\big]$
    Shapes: logprobs (B, T), advantages (B,), mask (B, T) -> scalar
    Raises: ValueError if the shapes do not match or for an unknown reduction.
    Source: deepseek (last GRPO slide).
    """
    return pg_surrogate_loss(logprobs, advantages, mask, reduction, **options)
