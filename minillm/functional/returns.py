r"""Returns and advantages along time: plain arrays, the last axis is time.

They are data for the losses, computed once per roll-out with the values of that moment and frozen (erratum
69). A step may end an episode in two ways: ``terminated`` (nothing follows, its value is 0) and ``truncated``
(cut off, the value of the state before the reset stands in for what would have followed).
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Real

from minillm.checks import require, require_positive
from minillm.functional.frozen import Array, frozen, kept_positions

Steps = Float[np.ndarray, "*B T"]


def _discount(where: str, what: str, value: float) -> None:
    require(0 <= value <= 1, where, what, "in [0, 1]", value)


def _steps(where: str, what: str, value: Any, like: np.ndarray | None = None) -> np.ndarray:
    array = frozen(value)
    array = array if array.dtype.kind == "f" else array.astype(np.float64)
    shape = array.shape if like is None else like.shape
    require(
        array.ndim >= 1 and array.shape == shape,
        where,
        what,
        f"of shape {shape if shape else '(..., T)'}",
        array,
    )
    return array


def _flags(where: str, what: str, value: Any, like: np.ndarray) -> np.ndarray:
    return np.zeros(like.shape, bool) if value is None else kept_positions(value, like.shape, f"{where} ({what})")


def done_flags(terminated: Any, truncated: Any) -> Bool[np.ndarray, "*B T"]:
    r"""Where an episode ends, in either way: there no advantage may leak in from the next one.

    Equation: `done-flags` $\mathrm{done}=\mathrm{terminated}\vee\mathrm{truncated}$
    Shapes: two (..., T) of booleans or 0/1 -> (..., T)
    Source: notes §10.6.
    Differs: the source has one flag; a time limit bootstraps and a terminal state does not (erratum 46).
    """
    ended = frozen(terminated)
    shape = ended.shape
    return kept_positions(ended, shape, "done_flags") | kept_positions(truncated, shape, "done_flags")


def return_discounted(rewards: Real[Array, "*B T"], gamma: float = 1.0, done: Any = None) -> Steps:
    r"""Sum of the rewards from every step on, each discounted by its distance.

    Equation: `return-discounted` $G_t=\sum_{l=0}^{T-t}\gamma^lr_{t+l}$
    Shapes: rewards (..., T), done (..., T) cuts episodes apart -> (..., T)
    Raises: ValueError for a discount outside [0, 1].
    Source: notes §10.5 and §10.6.
    """
    _discount("return_discounted", "gamma", gamma)
    r = _steps("return_discounted", "rewards", rewards)
    ends = _flags("return_discounted", "done", done, r)
    out, following = np.empty_like(r), np.zeros(r.shape[:-1], r.dtype)
    for t in reversed(range(r.shape[-1])):
        following = out[..., t] = r[..., t] + gamma * np.where(ends[..., t], 0, following)
    return out


def return_split(rewards: Real[Array, "*B T"], t: int, gamma: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    r"""The return of an episode in two parts: what was paid before step t, and what comes from it on.

    Equation: `return-split` $\mathcal R(\tau)=\sum_{k<t}\gamma^kr_k+\gamma^tG_t$
    Shapes: rewards (..., T) -> two of (...)
    Raises: ValueError for a step outside [0, T) or a discount outside [0, 1].
    Source: notes §10.6.
    Differs: the second part is the discount to the power t times the return, not the return itself (erratum
        64).
    """
    _discount("return_split", "gamma", gamma)
    r = _steps("return_split", "rewards", rewards)
    require(0 <= t < r.shape[-1], "return_split", "t", f"in [0, {r.shape[-1]})", t)
    weighted = r * gamma ** np.arange(r.shape[-1])
    future = gamma**t * return_discounted(r[..., t:], gamma)[..., 0]
    return np.asarray(weighted[..., :t].sum(-1)), np.asarray(future)


def td_residual(
    rewards: Real[Array, "*B T"],
    values: Float[Array, "*B T"],
    next_values: Float[Array, "*B T"],
    terminated: Any = None,
    gamma: float = 1.0,
) -> Steps:
    r"""How much better one step went than its value foretold.

    Equation: `td-residual` $\delta_t=r_t+\gamma(1-\mathrm{terminated}_t)V(s_{t+1})-V(s_t)$
    Equation: `td-unbiased` $\mathbb E_{s_{t+1}\sim P}[\delta_t]=A^\pi$ when $V=V^\pi$
    Shapes: four (..., T) -> (..., T); next_values holds V(s_{t+1}), after a truncation that of the state
        before the reset
    Raises: ValueError if the shapes differ or for a discount outside [0, 1].
    Source: deepseek (GAE); lecture06; notes §10.5 and §10.6.
    Differs: the average is over the next state given the action (erratum 67).
    """
    _discount("td_residual", "gamma", gamma)
    r = _steps("td_residual", "rewards", rewards)
    v, following = (
        _steps("td_residual", "values", values, r),
        _steps("td_residual", "next_values", next_values, r),
    )
    return r + gamma * np.where(_flags("td_residual", "terminated", terminated, r), 0, following) - v


def n_step_advantage(rewards: Real[Array, "*B T"], values: Float[Array, "*B T"], n: int, gamma: float = 1.0) -> Steps:
    r"""n rewards and then the value, minus the value now; for one episode that ends with the last step.

    Equation: `n-step-advantage` $\hat A^{(n)}_t=\sum_{l<n}\gamma^lr_{t+l}+\gamma^nV(s_{t+n})-V(s_t)$
    Shapes: two (..., T) -> (..., T); rewards and values past the end are 0
    Raises: ValueError if n is not a positive integer or the shapes differ.
    Source: notes §10.6.
    """
    require_positive(n, "n_step_advantage", "n", integer=True)
    _discount("n_step_advantage", "gamma", gamma)
    r = _steps("n_step_advantage", "rewards", rewards)
    v = _steps("n_step_advantage", "values", values, r)
    length = r.shape[-1]
    padding = np.zeros((*r.shape[:-1], n), r.dtype)
    r_padded, v_padded = np.concatenate([r, padding], -1), np.concatenate([v, padding], -1)
    paid = sum(gamma**k * r_padded[..., k : k + length] for k in range(min(n, length)))
    return paid + gamma**n * v_padded[..., n : n + length] - v


def mc_advantage(
    rewards: Real[Array, "*B T"], values: Float[Array, "*B T"], gamma: float = 1.0, done: Any = None
) -> Steps:
    r"""The return that was seen, minus the value.

    Equation: `mc-advantage` $\hat A_t=G_t-V(s_t)$
    Shapes: two (..., T) -> (..., T)
    Raises: ValueError if the shapes differ or for a discount outside [0, 1].
    Source: notes §10.6; lecture06 (bias and variance).
    Differs: a baseline that depends on the state alone never biases the gradient (erratum 66).
    """
    returns = return_discounted(rewards, gamma, done)
    return returns - _steps("mc_advantage", "values", values, returns)


def gae_sum(deltas: Float[Array, "*B T"], gamma: float = 1.0, lam: float = 0.95) -> Steps:
    r"""Generalised advantage estimate of one episode as the sum that defines it.

    Equation: `gae-sum` $\hat A_t=\sum_{l\ge0}(\gamma\lambda)^l\delta_{t+l}$
    Shapes: deltas (..., T) -> (..., T); quadratic in T, `gae` is the linear recursion
    Raises: ValueError for a discount outside [0, 1].
    Source: deepseek (GAE); lecture06; notes §10.6; Schulman et al. 2016.
    """
    _discount("gae_sum", "gamma", gamma)
    _discount("gae_sum", "lam", lam)
    delta = _steps("gae_sum", "deltas", deltas)
    distance = np.subtract.outer(-np.arange(delta.shape[-1]), -np.arange(delta.shape[-1]))  # l = column - row
    weights = np.where(distance >= 0, (gamma * lam) ** np.maximum(distance, 0), 0)
    return delta @ weights.T.astype(delta.dtype)


def gae_from_n_steps(
    rewards: Real[Array, "*B T"], values: Float[Array, "*B T"], gamma: float = 1.0, lam: float = 0.95
) -> Steps:
    r"""The same as an average of n-step advantages with geometric weights.

    From the episode's end on all n-step advantages are equal, so their weights collapse into the last one.

    Equation: `gae-sum` $\hat A_t=(1-\lambda)\sum_{n\ge1}\lambda^{n-1}\hat A^{(n)}_t$
    Shapes: two (..., T) -> (..., T); rewards and values past the end are 0
    Raises: ValueError if the shapes differ or for a discount outside [0, 1].
    Source: notes §10.6.
    """
    _discount("gae_from_n_steps", "lam", lam)
    r = _steps("gae_from_n_steps", "rewards", rewards)
    length = r.shape[-1]
    terms = [n_step_advantage(r, values, n, gamma) for n in range(1, length + 1)]
    average = sum(((1 - lam) * lam ** (n - 1) * term for n, term in enumerate(terms[:-1], start=1)), np.zeros_like(r))
    return average + lam ** (length - 1) * terms[-1] if length else r


def gae(
    rewards: Real[Array, "*B T"],
    values: Float[Array, "*B T"],
    gamma: float = 1.0,
    lam: float = 0.95,
    *,
    next_values: Array | None = None,
    terminated: Any = None,
    truncated: Any = None,
    mask: Any = None,
) -> Steps:
    r"""Generalised advantage estimate by the backward recursion.

    Steps that the mask drops (padding, tokens that the policy did not write) are skipped: the recursion goes
    from one kept step to the next, and their advantage is 0.

    Equation: `gae-recursion` $\hat A_t=\delta_t+\gamma\lambda(1-\mathrm{done}_t)\hat A_{t+1}$,
        $\hat A_{T+1}=0$ with $T$ the last real step
    Shapes: (..., T) each -> (..., T). Without next_values the value of the next kept step is taken, and 0
        after the last.
    Raises: ValueError if the shapes differ, for a discount outside [0, 1], or for truncated steps without
        next_values.
    Source: notes §10.5 and (15); deepseek (GAE); lecture06.
    Differs: the advantage is 0 one step past the end and not at the last step, where the score arrives
        (erratum 68).
    """
    _discount("gae", "gamma", gamma)
    _discount("gae", "lam", lam)
    r = _steps("gae", "rewards", rewards)
    v = _steps("gae", "values", values, r)
    bootstrap = None if next_values is None else _steps("gae", "next_values", next_values, r)
    ends, cuts = _flags("gae", "terminated", terminated, r), _flags("gae", "truncated", truncated, r)
    hint = "The state before a reset is not the next row of the buffer, so its value has to be passed."
    require(
        bootstrap is not None or not cuts.any(),
        "gae",
        "next_values",
        "given where steps are truncated",
        None,
        hint,
    )
    keep = np.ones(r.shape, bool) if mask is None else kept_positions(mask, r.shape, "gae (mask)")
    out = np.zeros_like(r)
    advantage, value_after = np.zeros(r.shape[:-1], r.dtype), np.zeros(r.shape[:-1], r.dtype)
    for t in reversed(range(r.shape[-1])):
        following = value_after if bootstrap is None else bootstrap[..., t]
        delta = r[..., t] + gamma * np.where(ends[..., t], 0, following) - v[..., t]
        carried = np.where(ends[..., t] | cuts[..., t], 0, advantage)
        advantage = np.where(keep[..., t], delta + gamma * lam * carried, advantage)
        value_after = np.where(keep[..., t], v[..., t], value_after)
        out[..., t] = np.where(keep[..., t], advantage, 0)
    return out


def value_target(advantages: Float[Array, "*B T"], values: Float[Array, "*B T"]) -> Steps:
    r"""What the critic is to predict, from the advantages before any whitening.

    Equation: `value-target` $\hat G_t=\mathrm{sg}[\hat A_t+V_{\psi_k}(s_t)]$
    Shapes: two (..., T) -> (..., T)
    Raises: ValueError if the shapes differ.
    Source: notes §10.6 (16).
    """
    a = _steps("value_target", "advantages", advantages)
    return a + _steps("value_target", "values", values, a)
