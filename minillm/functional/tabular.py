r"""Decision processes small enough to solve exactly: what the estimators of reinforcement learning estimate.

States and actions are numbered. A policy is an array (S, A) of probabilities, or logits where a gradient is
wanted. Everything is summed, nothing is sampled.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.softmax import softmax

Policy = Float[np.ndarray, "S A"]


@dataclass(frozen=True)
class MDP:
    r"""A finite Markov decision process.

    Equation: `mdp` $(\mathcal S,\mathcal A,P,r,\gamma)$
    Shapes: transitions (S, A, S) with rows that sum to 1, rewards (S, A), start (S,), discount in [0, 1]
    Raises: ValueError if a shape does not fit or a law does not sum to 1.
    Source: notes §10.6; deepseek (flash RL).
    """

    transitions: Float[np.ndarray, "S A S"]
    rewards: Float[np.ndarray, "S A"]
    start: Float[np.ndarray, " S"]
    discount: float

    def __post_init__(self) -> None:
        P = self.transitions
        fits = P.ndim == 3 and P.shape == (*self.rewards.shape, len(self.start))
        require(fits, "MDP", "transitions", f"of shape {(*self.rewards.shape, len(self.start))}", P)
        laws = bool(np.allclose(P.sum(-1), 1) and np.isclose(self.start.sum(), 1) and (P >= 0).all())
        require(laws, "MDP", "transitions and start", "laws that sum to 1", P)
        require(0 <= self.discount <= 1, "MDP", "the discount", "in [0, 1]", self.discount)


class Values(NamedTuple):
    """Exact values of states and of actions, and their difference."""

    v: np.ndarray
    q: np.ndarray
    advantage: np.ndarray


def value_functions(mdp: MDP, policy: Policy) -> Values:
    r"""Values of a policy by solving Bellman's equation.

    Equation: `bellman-expectation` $V^\pi=(I-\gamma P_\pi)^{-1}r_\pi$, from
        $V^\pi(s)=\mathbb E[r+\gamma V^\pi(s')]$
    Equation: `value-functions` $Q^\pi(s,a)=\mathbb E[G_t\mid s,a],\ V^\pi(s)=\sum_a\pi(a\mid s)Q^\pi(s,a)$
    Equation: `advantage` $A^\pi=Q^\pi-V^\pi$
    Shapes: policy (S, A) -> v (S,), q (S, A), advantage (S, A)
    Raises: ValueError for a discount of 1, where episodes need not end: use `finite_horizon_objective`.
    Source: notes §10.6 and footnote 18; lecture06 (expected value); deepseek (advantage).
    """
    require(mdp.discount < 1, "value_functions", "the discount", "below 1", mdp.discount)
    p_policy = np.einsum("sa,sat->st", policy, mdp.transitions)
    r_policy = (policy * mdp.rewards).sum(-1)
    v = np.linalg.solve(np.eye(len(r_policy)) - mdp.discount * p_policy, r_policy)
    q = mdp.rewards + mdp.discount * mdp.transitions @ v
    return Values(v, q, q - v[:, None])


def discounted_visits(mdp: MDP, policy: Policy) -> Float[np.ndarray, " S"]:
    r"""How often each state is visited, counted with the discount.

    Equation: `policy-gradient-theorem`
        $d(s)=\sum_t\gamma^t\Pr(s_t=s)=\big((I-\gamma P_\pi^\top)^{-1}p_0\big)_s$
    Shapes: policy (S, A) -> (S,), sum 1/(1 - discount)
    Raises: ValueError for a discount of 1.
    Source: notes §10.6.
    """
    require(mdp.discount < 1, "discounted_visits", "the discount", "below 1", mdp.discount)
    p_policy = np.einsum("sa,sat->st", policy, mdp.transitions)
    return np.linalg.solve(np.eye(len(mdp.start)) - mdp.discount * p_policy.T, mdp.start)


def policy_gradient(mdp: MDP, policy: Policy, credit: Policy | None = None) -> Policy:
    r"""The gradient of the objective by the logits of a softmax policy, by the theorem.

    Equation: `policy-gradient-theorem` $\nabla J=\sum_t\mathbb E[\gamma^t\nabla\log\pi_\theta(a_t\mid
        s_t)\,A^{\pi_\theta}(s_t,a_t)]$
    Equation: `pg-q-form` with ``credit`` $Q^\pi$ in place of the advantage
    Equation: `baseline-invariance` any $b(s)$ may be taken from the credit
    Shapes: policy (S, A), credit (S, A) -> (S, A)
    Raises: ValueError for a discount of 1.
    Source: notes §10.6; deepseek (lemma); topics #14.
    """
    weights = value_functions(mdp, policy).advantage if credit is None else credit
    per_state = policy * (weights - (policy * weights).sum(-1, keepdims=True))  # mean of score times credit
    return discounted_visits(mdp, policy)[:, None] * per_state


def trajectory_law(
    mdp: MDP, policy: Policy, steps: int
) -> tuple[Int[np.ndarray, "n T"], Int[np.ndarray, "n T"], Float[np.ndarray, " n"]]:
    r"""All paths of a number of steps, with their probabilities.

    Equation: `trajectory-probability` $p_\theta(\tau)=p(s_0)\prod_t\pi_\theta(a_t\mid s_t)P(s_{t+1}\mid
        s_t,a_t)$
    Shapes: -> states (n, T), actions (n, T), probabilities (n,)
    Raises: ValueError if there are more than a million paths.
    Source: notes §10.6.
    """
    require_positive(steps, "trajectory_law", "steps", integer=True)
    S, A = policy.shape
    require((S * A) ** steps <= 1_000_000, "trajectory_law", "(S A)^T", "at most 1000000", (S * A) ** steps)
    pairs = np.array(list(itertools.product(range(S), range(A))))
    paths = pairs[np.array(list(itertools.product(range(S * A), repeat=steps)))]  # (n, T, 2)
    states, actions = paths[..., 0], paths[..., 1]
    probability = mdp.start[states[:, 0]] * policy[states, actions].prod(-1)
    probability = probability * mdp.transitions[states[:, :-1], actions[:, :-1], states[:, 1:]].prod(-1)
    return states, actions, probability


def _example(rng):
    transitions = rng.gamma(1.0, size=(3, 2, 3))
    mdp = MDP(transitions / transitions.sum(-1, keepdims=True), rng.normal(size=(3, 2)), np.array([0.5, 0.5, 0.0]), 0.8)
    return (rng.normal(size=(3, 2)),), {"mdp": mdp, "steps": int(rng.integers(1, 5))}


@written("finite_horizon_objective", example=_example)
def finite_horizon_objective(logits: Float[Tensor, "S A"], mdp: MDP, steps: int) -> Float[Tensor, ""]:
    r"""Mean discounted reward of a softmax policy over a number of steps, differentiable by its logits.

    Equation: `rl-objective` $J(\theta)=\mathbb E_{\tau\sim p_\theta}\big[\sum_{t<T}\gamma^tr_t\big]$, to be
        maximised
    Shapes: logits (S, A) -> scalar
    Raises: ValueError if the number of steps is not a positive integer.
    Source: notes (13); deepseek (flash RL); bridging §2.
    Differs: the horizon is finite or the discount below 1, else the sum diverges (erratum 102).
    """
    require_positive(steps, "finite_horizon_objective", "steps", integer=True)
    policy = softmax(logits)
    S, A = logits.shape
    visits, total = Tensor(mdp.start.astype(logits.dtype)), Tensor(np.zeros((), logits.dtype))
    flat = mdp.transitions.reshape(S * A, S).astype(logits.dtype)
    for t in range(steps):
        acts = visits.unsqueeze(-1) * policy  # (S, A)
        total = total + (acts * mdp.rewards).sum() * mdp.discount**t
        visits = acts.reshape(S * A) @ flat  # (S,)
    return total


def optimal_baseline(policy: Policy, q: Policy) -> Float[np.ndarray, " S"]:
    r"""The baseline that makes the score-function gradient of a softmax policy least noisy, for each state.

    Equation: `optimal-baseline` $b^\ast(s)=\frac{\mathbb E[\lVert\nabla\log\pi\rVert^2Q]}{\mathbb
        E\lVert\nabla\log\pi\rVert^2}$
    Shapes: policy (S, A), q (S, A) -> (S,)
    Source: deepseek (computing the gradient).
    Differs: it is not the value function, which usually lowers the variance but not always (erratum 61).
    """
    squared = 1 - 2 * policy + (policy**2).sum(-1, keepdims=True)  # of one-hot minus policy
    return (policy * squared * q).sum(-1) / (policy * squared).sum(-1)


def gradient_variance(policy: Policy, q: Policy, baseline: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    r"""Trace of the covariance of the one-sample gradient with a baseline, for each state.

    Equation: `optimal-baseline` $\mathbb E\lVert\nabla\log\pi\,(Q-b)\rVert^2-\lVert\mathbb
        E[\nabla\log\pi\,Q]\rVert^2$
    Shapes: policy (S, A), q (S, A), baseline (S,) -> (S,)
    Source: deepseek (computing the gradient).
    """
    squared = 1 - 2 * policy + (policy**2).sum(-1, keepdims=True)
    mean = policy * (q - (policy * q).sum(-1, keepdims=True))
    return (policy * squared * (q - baseline[:, None]) ** 2).sum(-1) - (mean**2).sum(-1)


class LanguageMDP(NamedTuple):
    """A decision process over prefixes, and which prefix each state is."""

    mdp: MDP
    prefixes: list[tuple[int, ...]]


def language_mdp(
    vocabulary: int, end: int, longest: int, reward: Callable[[tuple[int, ...]], float], discount: float = 1.0
) -> LanguageMDP:
    r"""A language model's task as a decision process: a state is a prefix, an action appends a token.

    A response is over, and is paid for, when it ends itself or has the longest length allowed; then the
    process rests in a last state where nothing more is earned.

    Equation: `lm-as-mdp` $s_t=(x,y_{<t}),\ a_t=y_t$, $P(s_{t+1}\mid s_t,a_t)=\mathbf1\{s_{t+1}=(s_t,a_t)\}$
    Equation: `expected-reward-lm` $\mathbb E_{\hat y\sim p_\theta(\cdot\mid x)}[R(x,\hat y)]$ is the value of
        the empty prefix
    Shapes: -> process with one state for each unfinished prefix and one for the end
    Raises: ValueError if the longest length or the vocabulary is not a positive integer, end is outside it, or
        there are more than 5000 prefixes.
    Source: notes §10.5 and §10.6; lecture06 (state and actions, optimising for preferences); deepseek (PPO
        for LLMs).
    """
    require_positive(vocabulary, "language_mdp", "vocabulary", integer=True)
    require_positive(longest, "language_mdp", "longest", integer=True)
    require(0 <= end < vocabulary, "language_mdp", "end", f"in [0, {vocabulary})", end)
    words = [word for word in range(vocabulary) if word != end]
    prefixes = [p for length in range(longest) for p in itertools.product(words, repeat=length)]
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    S = len(prefixes) + 1
    require(S <= 5000, "language_mdp", "the number of prefixes", "at most 5000", S - 1, "Sample instead.")
    transitions, rewards = np.zeros((S, vocabulary, S)), np.zeros((S, vocabulary))
    transitions[-1, :, -1] = 1
    for (i, prefix), word in itertools.product(enumerate(prefixes), range(vocabulary)):
        longer = (*prefix, word)
        transitions[i, word, index.get(longer, S - 1)] = 1
        rewards[i, word] = 0.0 if longer in index else reward(longer)
    start = np.eye(S)[0]
    return LanguageMDP(MDP(transitions, rewards, start, discount), prefixes)
