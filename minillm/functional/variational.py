r"""Convex duality, and the optimum of a reward regularised by a divergence."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require_positive
from minillm.functional.information import check_distribution, kl_divergence
from minillm.functional.softmax import logsumexp


def convex_conjugate(
    omega: Callable[[np.ndarray], np.ndarray], t: Float[np.ndarray, "*B"], grid: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "*B"]:
    r"""The convex conjugate by search over a grid, as an oracle for closed forms.

    Equation: `jensen-convexity-tools` $\Omega^\ast(t)=\sup_u\{ut-\Omega(u)\}$
    Shapes: t (...), grid (n,) -> (...); a lower bound that tightens with the grid
    Source: notes §10.9.
    """
    return np.max(np.asarray(t)[..., None] * grid - omega(grid), axis=-1)


def fenchel_young_slack(
    omega: Callable[[Any], Any],
    conjugate: Callable[[Any], Any],
    u: Float[np.ndarray, "*B"],
    t: Float[np.ndarray, "*B"],
) -> Float[np.ndarray, "*B"]:
    r"""By how much the Fenchel-Young inequality is strict; 0 exactly where t is a slope of the function at u.

    Equation: `jensen-convexity-tools` $\Omega(u)+\Omega^\ast(t)-ut\ge0$, equality iff $t\in\partial\Omega(u)$
    Shapes: u (...), t (...) -> (...)
    Source: notes §10.9.
    """
    return np.asarray(omega(u) + conjugate(t) - u * t)


def _example(rng):
    p = rng.uniform(0.2, 1.0, size=(2, 4))
    return (rng.normal(size=(2, 4)), p / p.sum(-1, keepdims=True)), {"beta": 0.7}


def _example_objective(rng):
    (r, p), beta = _example(rng)
    return (p[::-1].copy(), r, p), beta


@written("regularised_reward_objective", example=_example_objective)
def regularised_reward_objective(
    policy: Float[Tensor, "*B n"],
    reward: Float[Tensor, "*B n"],
    reference: Float[Tensor, "*B n"],
    beta: float,
) -> Float[Tensor, "*B"]:
    r"""Mean reward minus the price of leaving the reference; to be maximised.

    Equation: `donsker-varadhan` $\mathbb E_\pi[r]-\beta D_{\rm KL}(\pi\Vert\pi_{\rm ref})$
    Shapes: policy, reward, reference (..., n) -> (...)
    Raises: ValueError if a law is not a distribution or beta is not positive.
    Source: notes §10.9.
    """
    require_positive(beta, "regularised_reward_objective", "beta")
    return (policy * reward).sum(-1) - kl_divergence(policy, reference) * beta


@written("donsker_varadhan", example=_example)
def donsker_varadhan(
    reward: Float[Tensor, "*B n"], reference: Float[Tensor, "*B n"], beta: float
) -> Float[Tensor, "*B"]:
    r"""The largest value that objective can take, reached by the reference tilted by the exponential of the
    reward.

    Equation: `donsker-varadhan` $\max_\pi\mathbb E_\pi[r]-\beta D_{\rm KL}(\pi\Vert\pi_{\rm
        ref})=\beta\log\mathbb E_{\pi_{\rm ref}}[e^{r/\beta}]$
    Shapes: reward (..., n), reference (..., n) with positive entries -> (...)
    Raises: ValueError if the reference is not a distribution or beta is not positive.
    Source: notes §10.9.
    """
    require_positive(beta, "donsker_varadhan", "beta")
    check_distribution("donsker_varadhan", "the reference", reference)
    return logsumexp(reward * (1.0 / beta) + reference.log()) * beta
