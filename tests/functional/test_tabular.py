"""Exact reinforcement learning on tables: values, the policy gradient theorem, baselines, language as a process."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.functional import tabular as tab
from minillm.functional.minibatches import episode_minibatches, step_minibatches
from minillm.functional.policy_gradient import softmax_scores
from minillm.functional.reductions import aggregate, masked_mean
from tests.oracles import tiny_policies as law


def random_mdp(seed: int, S: int = 4, A: int = 3, discount: float = 0.8):
    rng = np.random.default_rng(seed)
    P, start = rng.gamma(1.0, size=(S, A, S)), rng.gamma(1.0, size=S)
    mdp = tab.MDP(P / P.sum(-1, keepdims=True), rng.normal(size=(S, A)), start / start.sum(), discount)
    return mdp, rng.normal(size=(S, A))


@pytest.mark.equation("mdp", "bellman-expectation", "value-functions", "advantage")
def test_exact_values_satisfy_bellman_and_agree_with_the_long_run():
    mdp, logits = random_mdp(0)
    policy = law.softmax(logits)
    values = tab.value_functions(mdp, policy)
    np.testing.assert_allclose((policy * values.q).sum(-1), values.v, atol=1e-13)
    np.testing.assert_allclose((policy * values.advantage).sum(-1), 0, atol=1e-13)
    backup = (policy * (mdp.rewards + 0.8 * mdp.transitions @ values.v)).sum(-1)
    np.testing.assert_allclose(backup, values.v, atol=1e-13)
    far = tab.finite_horizon_objective(Tensor(logits), mdp, 150).item()
    assert far == pytest.approx(mdp.start @ values.v, abs=1e-12)


@pytest.mark.equation("advantage", "wn-advantage")
def test_the_lectures_advantages_as_a_one_step_process():
    mdp = tab.MDP(np.zeros((2, 2, 2)) + np.array([0, 1.0]), np.array([[0.9, 0.2], [0, 0]]), np.array([1.0, 0]), 0.9)
    values = tab.value_functions(mdp, np.array([[4, 3], [3.5, 3.5]]) / 7)
    np.testing.assert_allclose(values.advantage[0], [0.3, -0.4], atol=1e-15)
    assert values.v[0] == pytest.approx(0.6)


@pytest.mark.equation("trajectory-probability", "rl-objective", "log-derivative-trick", "reinforce")
@pytest.mark.parametrize("discount", [0.5, 1.0])
def test_paths_have_a_law_and_its_mean_reward_is_the_objective(discount):
    mdp, logits = random_mdp(1, S=2, A=2, discount=discount)
    policy = law.softmax(logits)
    states, actions, probability = tab.trajectory_law(mdp, policy, 4)
    assert probability.sum() == pytest.approx(1, abs=1e-13) and len(probability) == 4**4
    returns = (mdp.rewards[states, actions] * discount ** np.arange(4)).sum(-1)
    live = Tensor(logits, requires_grad=True)
    objective = tab.finite_horizon_objective(live, mdp, 4)
    assert objective.item() == pytest.approx(probability @ returns, abs=1e-13)
    gradient = np.zeros_like(logits)  # each path's probability times return times its scores: dynamics drop out
    scores = np.eye(2) - policy[:, None, :]
    for t in range(4):
        np.add.at(gradient, states[:, t], (probability * returns)[:, None] * scores[states[:, t], actions[:, t]])
    np.testing.assert_allclose(grad(objective, live).data, gradient, atol=1e-14)


@pytest.mark.equation("log-derivative-trick")
def test_the_gradient_of_a_probability_is_itself_times_its_score():
    z = Tensor(law.LOGITS_P, requires_grad=True)
    p = law.softmax(law.LOGITS_P)
    jacobian = np.diag(p) - np.outer(p, p)
    np.testing.assert_allclose(p[:, None] * softmax_scores(z).data, jacobian, atol=1e-16)


@pytest.mark.equation("policy-gradient-theorem", "baseline-invariance", "pg-q-form")
def test_the_theorem_equals_finite_differences_of_the_objective():
    mdp, logits = random_mdp(2)
    policy = law.softmax(logits)
    gradient = tab.policy_gradient(mdp, policy)
    for place in [(0, 0), (1, 2), (3, 1)]:
        step = np.zeros_like(logits)
        step[place] = 1e-5
        ahead, behind = (mdp.start @ tab.value_functions(mdp, law.softmax(logits + s)).v for s in (step, -step))
        assert gradient[place] == pytest.approx((ahead - behind) / 2e-5, rel=1e-6, abs=1e-9)
    values = tab.value_functions(mdp, policy)
    np.testing.assert_allclose(tab.policy_gradient(mdp, policy, values.q), gradient, atol=1e-13)
    baseline = np.random.default_rng(0).normal(size=(4, 1))
    np.testing.assert_allclose(tab.policy_gradient(mdp, policy, values.q - baseline), gradient, atol=1e-13)
    assert tab.discounted_visits(mdp, policy).sum() == pytest.approx(1 / (1 - 0.8))


@pytest.mark.equation("optimal-baseline")
def test_the_baselines_of_erratum_61():
    policy, q = law.softmax(law.LOGITS_P)[None], law.REWARDS[None]
    v = (policy * q).sum(-1)
    best = tab.optimal_baseline(policy, q)
    assert (v.item(), best.item()) == (pytest.approx(0.705, abs=5e-4), pytest.approx(0.431, abs=5e-4))
    variances = [tab.gradient_variance(policy, q, b).item() for b in (np.zeros(1), v, best)]
    assert variances == pytest.approx([0.1439, 0.0818, 0.0397], abs=5e-5)
    for shift in (-0.05, 0.05):
        assert tab.gradient_variance(policy, q, best + shift).item() > variances[2]
    scores = (np.eye(5) - policy) * (q.T - 0.3)
    direct = (policy[0] @ (scores**2).sum(-1)) - np.sum((policy[0] @ scores) ** 2)
    assert tab.gradient_variance(policy, q, np.array([0.3])).item() == pytest.approx(direct)


@pytest.mark.equation("optimal-baseline")
def test_the_value_can_be_a_bad_baseline():
    policy, q = np.array([[0.99, 0.01]]), np.array([[1.0, 0.0]])
    best = tab.optimal_baseline(policy, q)
    assert best.item() == pytest.approx(0.01)
    assert tab.gradient_variance(policy, q, np.array([0.99])).item() == pytest.approx(0.0190, abs=5e-5)
    assert tab.gradient_variance(policy, q, np.zeros(1)).item() == pytest.approx(2e-6, rel=0.03)


@pytest.mark.equation("lm-as-mdp", "expected-reward-lm", "policy-sequence", "rl-objective")
def test_a_language_model_is_a_process_over_prefixes():
    tiny = law.TinyPolicy(longest=3)
    scores = np.random.default_rng(0).normal(size=len(tiny.responses))
    reward_of = dict(zip(tiny.responses, scores))
    process = tab.language_mdp(3, end=2, longest=3, reward=reward_of.__getitem__)
    assert process.prefixes == list(tiny.index) and ((process.mdp.transitions == 1).sum(-1) == 1).all()
    logits = np.random.default_rng(1).normal(size=(tiny.n_states, 3))
    live = Tensor(np.concatenate([logits, np.zeros((1, 3))]), requires_grad=True)
    value = tab.finite_horizon_objective(live, process.mdp, steps=5)  # resting at the end earns nothing
    assert value.item() == pytest.approx(tiny.expected_reward(logits, scores), abs=1e-14)
    gradient = grad(value, live).data
    np.testing.assert_allclose(gradient[:-1], tiny.policy_gradient(logits, scores), atol=1e-14)
    assert (gradient[-1] == 0).all()


@pytest.mark.equation("lm-as-mdp", "wn-step-rewards")
def test_the_lectures_prompt_gets_one_word_longer():
    words = ["The", "best", "way", "to", "learn", "<end>"]
    process = tab.language_mdp(6, end=5, longest=5, reward=lambda response: 0.9)
    index = {prefix: i for i, prefix in enumerate(process.prefixes)}
    state = index[tuple(words.index(w) for w in ("The", "best", "way"))]
    (after,) = np.flatnonzero(process.mdp.transitions[state, words.index("to")])
    assert [words[i] for i in process.prefixes[after]] == ["The", "best", "way", "to"]
    assert process.mdp.transitions[after, words.index("learn"), -1] == 1  # the longest length: over, and paid
    assert process.mdp.rewards[after, words.index("learn")] == 0.9


@pytest.mark.equation("minibatch-modes")
def test_step_minibatches_are_unbiased_and_episode_minibatches_are_not():
    mask = np.zeros((2, 9), bool)
    mask[0, 0] = mask[1] = True
    terms = np.array([[1.0], [2.0]]) * np.ones((2, 9))
    rng = np.random.default_rng(0)
    steps = list(step_minibatches(mask, 5, rng))
    assert np.mean([masked_mean(terms, part).item() for part in steps]) == pytest.approx(1.9)
    assert (sum(part.astype(int) for part in steps) == mask).all() and {part.sum() for part in steps} == {5}
    episodes = list(episode_minibatches(2, 1, rng))
    assert sorted(np.concatenate(episodes)) == [0, 1]
    assert np.mean([aggregate(terms[e], mask[e]).item() for e in episodes]) == 1.5
    fixed = [aggregate(terms[e], mask[e], divisor=5.0).item() for e in episodes]  # tokens per minibatch, on average
    assert np.mean(fixed) == pytest.approx(1.9)
    assert [len(e) for e in episode_minibatches(5, 2, rng)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tab.MDP(np.ones((2, 1, 2)), np.ones((2, 1)), np.array([1.0, 0]), 0.9), "laws that sum to 1"),
        (lambda: tab.MDP(np.ones((2, 1, 3)), np.ones((2, 1)), np.array([1.0, 0]), 0.9), "transitions must be of"),
        (lambda: tab.value_functions(random_mdp(0, discount=1.0)[0], np.ones((4, 3)) / 3), "discount must be below"),
        (lambda: tab.trajectory_law(random_mdp(0)[0], np.ones((4, 3)) / 3, 9), "at most 1000000"),
        (lambda: tab.language_mdp(3, 2, 14, len), "at most 5000"),
        (lambda: tab.language_mdp(3, 3, 2, len), r"end must be in \[0, 3\)"),
        (lambda: tab.finite_horizon_objective(Tensor(np.ones((4, 3))), random_mdp(0)[0], 0), "steps must be"),
        (lambda: next(episode_minibatches(3, 0, np.random.default_rng(0))), "size must be a positive integer"),
        (lambda: next(step_minibatches(np.ones((1, 2)), 0, np.random.default_rng(0))), "size must be a positive"),
    ],
)
def test_errors_say_what_is_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
