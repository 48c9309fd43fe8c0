"""Policy gradients as surrogate losses, by exact expectation on the five-action law and a small tree."""

import itertools

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.functional import policy_gradient as pg
from minillm.functional.returns import return_discounted
from minillm.functional.softmax import log_softmax, softmax
from tests.oracles import tiny_policies as law

P = law.softmax(law.LOGITS_P)
ADVANTAGES = law.REWARDS - P @ law.REWARDS
TRUE = P * ADVANTAGES


@pytest.mark.equation("score-function-zero-mean")
def test_the_score_has_mean_zero_under_its_own_policy_only():
    z = Tensor(law.LOGITS_P)
    scores = pg.softmax_scores(z).data
    np.testing.assert_allclose(P @ scores, 0, atol=1e-16)
    assert np.abs(law.softmax(law.LOGITS_Q) @ scores).max() > 0.1
    for action in range(5):
        live = Tensor(law.LOGITS_P, requires_grad=True)
        np.testing.assert_allclose(grad(log_softmax(live)[action], live).data, scores[action], atol=1e-15)


@pytest.mark.equation("pg-surrogate-loss")
def test_only_the_frozen_surrogate_has_the_policy_gradient():
    """Erratum 62: sampling law and advantages held still, or the gradient is another one."""
    live = Tensor(law.LOGITS_P, requires_grad=True)
    column = log_softmax(live).unsqueeze(-1)  # five one-step episodes
    per_action = [pg.pg_surrogate_loss(column[[a]], ADVANTAGES[[a]], np.ones((1, 1))) * P[a] for a in range(5)]
    frozen = -grad(sum(per_action[1:], per_action[0]), live).data
    np.testing.assert_allclose(frozen, TRUE, atol=1e-16)
    assert frozen[:2] == pytest.approx([0.1803, -0.0689], abs=5e-5)
    live = Tensor(law.LOGITS_P, requires_grad=True)
    p = softmax(live)
    everything = (p * (law.REWARDS - (p * law.REWARDS).sum()) * p.log()).sum()
    assert grad(everything, live).data[:2] == pytest.approx([0.1440, -0.0045], abs=5e-5)


@pytest.mark.equation("pg-surrogate-loss", "stop-gradient")
def test_advantages_are_frozen_even_when_they_are_live_tensors():
    logprobs = Tensor(np.log([[0.2, 0.5]]), requires_grad=True)
    gradient = grad(pg.pg_surrogate_loss(logprobs, logprobs * 2, np.ones((1, 2))), logprobs).data
    np.testing.assert_allclose(gradient, -2 * np.log([[0.2, 0.5]]))


class Tree:
    """Three steps of two actions with a reward after each that depends on the path; every path can be listed."""

    T = 3

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.paths = np.array(list(itertools.product(range(2), repeat=self.T)))
        self.states = np.array(
            [[int("1" + "".join(map(str, p[:t])), 2) - 1 for t in range(self.T)] for p in self.paths]
        )
        self.logits = rng.normal(size=(7, 2))
        reward_of = {p[: t + 1]: rng.normal() for p in map(tuple, self.paths) for t in range(self.T)}
        self.rewards = np.array([[reward_of[tuple(p[: t + 1])] for t in range(self.T)] for p in self.paths])

    def logprobs(self, logits):
        return log_softmax(logits)[self.states, self.paths]

    def law(self) -> np.ndarray:
        return np.exp(self.logprobs(Tensor(self.logits)).data.sum(-1))

    def true_gradient(self, gamma: float) -> np.ndarray:
        live = Tensor(self.logits, requires_grad=True)
        discounted = (self.rewards * gamma ** np.arange(self.T)).sum(-1)
        return grad((self.logprobs(live).sum(-1).exp() * discounted).sum(), live).data

    def mean_gradient(self, loss_of_path) -> np.ndarray:
        live = Tensor(self.logits, requires_grad=True)
        logprobs, probabilities = self.logprobs(live), self.law()
        terms = [loss_of_path(logprobs[[i]], i) * probabilities[i] for i in range(len(self.paths))]
        return -grad(sum(terms[1:], terms[0]), live).data


ONES = np.ones((1, 3))


@pytest.mark.equation("reinforce", "reinforce-to-go", "pg-q-form", "return-split")
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_all_credits_give_the_gradient_of_the_objective(gamma):
    tree = Tree()
    true = tree.true_gradient(gamma)
    whole = (tree.rewards * gamma ** np.arange(3)).sum(-1)
    reinforce = tree.mean_gradient(lambda lp, i: pg.reinforce_loss(lp, whole[[i]], ONES))
    np.testing.assert_allclose(reinforce, true, atol=1e-15)
    shifted = tree.mean_gradient(lambda lp, i: pg.reinforce_loss(lp, whole[[i]], ONES, baseline=3.0))
    np.testing.assert_allclose(shifted, true, atol=1e-14)
    to_go = tree.mean_gradient(lambda lp, i: pg.reinforce_to_go_loss(lp, tree.rewards[[i]], ONES, gamma))
    np.testing.assert_allclose(to_go, true, atol=1e-15)
    # Q in place of the return: the mean of the return over what follows the state and the action.
    returns, probabilities = return_discounted(tree.rewards, gamma), tree.law()
    q = np.zeros_like(returns)
    for i, t in np.ndindex(*q.shape):
        same = (tree.paths[:, : t + 1] == tree.paths[i, : t + 1]).all(-1)
        q[i, t] = probabilities[same] @ returns[same, t] / probabilities[same].sum()
    weighted = q * gamma ** np.arange(3)
    np.testing.assert_allclose(
        tree.mean_gradient(lambda lp, i: pg.pg_surrogate_loss(lp, weighted[[i]], ONES)), true, atol=1e-15
    )


@pytest.mark.equation("reinforce-to-go", "baseline-invariance")
def test_the_discount_weight_matters_and_a_state_baseline_does_not():
    """Erratum 64: without the weight each step's term is too large by the discount's power, unless it is 1."""
    tree = Tree(1)
    baseline = np.random.default_rng(2).normal(size=7)[tree.states]

    def found(gamma, **options):
        return tree.mean_gradient(lambda lp, i: pg.reinforce_to_go_loss(lp, tree.rewards[[i]], ONES, gamma, **options))

    with_baseline = tree.mean_gradient(
        lambda lp, i: pg.reinforce_to_go_loss(lp, tree.rewards[[i]], ONES, 0.5, baselines=baseline[[i]])
    )
    np.testing.assert_allclose(with_baseline, tree.true_gradient(0.5), atol=1e-14)
    unweighted, true = found(0.5, discount_weighting=False), tree.true_gradient(0.5)
    depth = np.array([0, 1, 1, 2, 2, 2, 2])[:, None]
    np.testing.assert_allclose(unweighted, true / 0.5**depth, atol=1e-14)
    np.testing.assert_allclose(found(1.0, discount_weighting=False), tree.true_gradient(1.0), atol=1e-14)


@pytest.mark.equation("baseline-invariance", "reinforce", "reinforce-to-go")
def test_a_baseline_is_taken_from_the_credit():
    logprobs, rewards = np.array([[-1.0, -2.0]]), np.array([[3.0, 4.0]])
    returns = return_discounted(rewards, 1.0)
    assert pg.reinforce_loss(logprobs, np.array([7.0]), np.ones((1, 2)), baseline=7.0).item() == 0
    assert pg.reinforce_to_go_loss(logprobs, rewards, np.ones((1, 2)), baselines=returns).item() == 0


@pytest.mark.equation("reinforce-to-go")
def test_masked_actions_get_no_credit():
    logprobs = Tensor(np.array([[-1.0, np.nan, -2.0]]), requires_grad=True)
    rewards, mask = np.array([[1.0, np.nan, 2.0]]), np.array([[1, 0, 1]])
    gradient = grad(pg.reinforce_to_go_loss(logprobs, rewards, mask), logprobs).data
    np.testing.assert_array_equal(gradient, [[-3, 0, -2]])


def test_errors_say_what_is_wanted():
    with pytest.raises(ValueError, match="scores must be of shape"):
        pg.reinforce_loss(np.ones((2, 3)), np.ones(3), np.ones((2, 3)))
    with pytest.raises(ValueError, match="advantages must be of shape"):
        pg.pg_surrogate_loss(np.ones((2, 3)), np.ones(3), np.ones((2, 3)))
    with pytest.raises(ValueError, match="rewards must be of shape"):
        pg.reinforce_to_go_loss(np.ones((2, 3)), np.ones((2, 2)), np.ones((2, 3)))
