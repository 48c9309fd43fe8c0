"""GRPO on a vocabulary of three words, where every response and every group can be listed.

The oracle (tests/oracles/tiny_policies.py) knows nothing of the engine: probabilities, policy gradients and
the loss with its derivative by each log-prob are loops of plain numbers.
"""

import itertools

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.functional.advantages import grpo_advantage_mean, grpo_advantage_std, rloo_advantage
from minillm.functional.kl_estimators import kl_estimate
from minillm.functional.policy_gradient import grpo_vanilla_pg_loss, reinforce_loss
from minillm.functional.policy_losses import grpo_kl_objective, grpo_loss
from minillm.functional.ppo_losses import surrogate_objective
from minillm.functional.reductions import aggregation_weights
from minillm.functional.softmax import log_softmax
from tests.oracles.tiny_policies import TinyPolicy, kl, scalar_grpo, softmax

TINY, SMALL = TinyPolicy(longest=3), TinyPolicy(longest=2)
NO_CLIP = {"clip_low": 1.0, "clip_high": 1e9}


def problem(policy: TinyPolicy, seed: int = 0):
    rng = np.random.default_rng(seed)
    logits, old, reference = rng.normal(size=(3, policy.n_states, policy.words))
    return logits, old, reference, rng.normal(size=len(policy.responses))


def live_logprobs(policy: TinyPolicy, logits: Tensor, rows=slice(None)) -> Tensor:
    """Log-probs of the words of the responses as a function of the logits, by the engine."""
    return log_softmax(logits)[policy.states[rows], policy.ids[rows]]


def expected(policy: TinyPolicy, logits: np.ndarray, law: np.ndarray, loss_of_response):
    """The mean over responses of a loss of one response, under a fixed law, and its gradient by the logits."""
    live = Tensor(logits, requires_grad=True)
    terms = [loss_of_response(live_logprobs(policy, live, [i]), [i]) * law[i] for i in range(len(law))]
    total = sum(terms[1:], terms[0])
    return total.item(), grad(total, live).data


def test_the_oracle_itself():
    assert len(TINY.responses) == 15 and len(SMALL.responses) == 7
    logits, _, _, rewards = problem(TINY)
    assert TINY.probabilities(logits).sum() == pytest.approx(1, abs=1e-14)
    gradient = TINY.policy_gradient(logits, rewards)
    for place in [(0, 0), (3, 1), (6, 2)]:
        step = np.zeros_like(logits)
        step[place] = 1e-5
        numeric = TINY.expected_reward(logits + step, rewards) - TINY.expected_reward(logits - step, rewards)
        assert gradient[place] == pytest.approx(numeric / 2e-5, rel=1e-7)


@pytest.mark.equation("grpo-loss", "grpo-clip", "kl-estimator-k3", "loss-aggregation")
@pytest.mark.parametrize("reduction", ["seq-mean", "token-mean", "seq-sum", "constant"])
def test_value_and_derivative_by_every_logprob_equal_the_scalar_loop(reduction):
    logits, old, reference, _ = problem(TINY)
    rng = np.random.default_rng(1)
    for rows in (np.arange(15), np.array([0, 4, 4, 14]), np.array([7])):
        mask = TINY.mask[rows]
        current, before, ref = (TINY.token_logprobs(z)[rows] for z in (logits, old, reference))
        advantages = rng.normal(size=len(rows))
        weights = aggregation_weights(mask, reduction, length=3)
        loss, by_logprob = scalar_grpo(current, before, ref, advantages, mask, high=0.28, beta=0.3, weights=weights)
        live = Tensor(current, requires_grad=True)
        ours = grpo_loss(live, before, advantages, mask, ref, beta=0.3, clip_high=0.28, reduction=reduction, length=3)
        assert ours.loss.item() == pytest.approx(loss, abs=1e-14)
        np.testing.assert_allclose(grad(ours.loss, live).data, by_logprob, atol=1e-15)
        assert 0 < ours.clip_fraction < 1 or len(rows) == 1  # both branches were taken


@pytest.mark.equation("grpo-loss", "ppo-degenerate", "grpo-vanilla-pg", "reinforce")
@pytest.mark.parametrize(
    "loss_of",
    [
        lambda lp, old, a, m: grpo_loss(lp, old, a, m, reduction="seq-sum").loss,
        lambda lp, old, a, m: grpo_vanilla_pg_loss(lp, a, m),
        lambda lp, old, a, m: reinforce_loss(lp, a, m),
    ],
    ids=["grpo", "vanilla", "reinforce"],
)
def test_in_the_first_step_the_gradient_is_minus_the_policy_gradient(loss_of):
    logits, _, _, rewards = problem(TINY)
    sampled = TINY.token_logprobs(logits)
    law = TINY.probabilities(logits)
    _, gradient = expected(TINY, logits, law, lambda lp, i: loss_of(lp, sampled[i], rewards[i], TINY.mask[i]))
    np.testing.assert_allclose(gradient, -TINY.policy_gradient(logits, rewards), atol=1e-15)


@pytest.mark.equation("grpo-ratio-sequence", "importance-ratio", "surrogate-objective")
def test_off_policy_the_response_ratio_is_exact_and_the_token_ratio_is_not():
    """Errata 63 and 81: samples of the old policy with the whole ratio give the new policy's value and gradient."""
    logits, old, _, rewards = problem(TINY)
    sampled, law = TINY.token_logprobs(old), TINY.probabilities(old)

    def loss(level):
        return expected(
            TINY,
            logits,
            law,
            lambda lp, i: grpo_loss(lp, sampled[i], rewards[i], TINY.mask[i], level=level, **NO_CLIP).loss,
        )

    value, gradient = loss("sequence")
    assert value == pytest.approx(-TINY.expected_reward(logits, rewards), abs=1e-14)
    np.testing.assert_allclose(gradient, -TINY.policy_gradient(logits, rewards), atol=1e-14)
    value, gradient = loss("token")
    assert abs(value + TINY.expected_reward(logits, rewards)) > 0.05
    assert np.abs(gradient + TINY.policy_gradient(logits, rewards)).max() > 0.01


@pytest.mark.equation("surrogate-objective")
def test_weighting_samples_of_the_new_policy_counts_the_change_twice():
    """Erratum 63: with samples of the trained policy and a ratio, the full gradient at the old policy is doubled."""
    logits, _, _, rewards = problem(SMALL)
    old = SMALL.token_logprobs(logits)
    live = Tensor(logits, requires_grad=True)
    logprobs = live_logprobs(SMALL, live)
    response = (logprobs * SMALL.mask).sum(-1)
    ratio = (response - np.where(SMALL.mask, old, 0).sum(-1)).exp()
    doubled = grad((response.exp() * ratio * rewards).sum(), live).data
    np.testing.assert_allclose(doubled, 2 * SMALL.policy_gradient(logits, rewards), atol=1e-15)
    law = SMALL.probabilities(logits)
    live = Tensor(logits, requires_grad=True)
    pieces = [
        surrogate_objective(live_logprobs(SMALL, live, [i]), old[[i]], rewards[[i]], SMALL.mask[[i]])
        * (law[i] * SMALL.mask[i].sum())
        for i in range(len(law))
    ]
    np.testing.assert_allclose(
        grad(sum(pieces[1:], pieces[0]), live).data, SMALL.policy_gradient(logits, rewards), atol=1e-15
    )


def every_group(policy: TinyPolicy, logits: np.ndarray, size: int):
    """All groups of responses with their probabilities."""
    law = policy.probabilities(logits)
    for members in itertools.product(range(len(law)), repeat=size):
        yield np.array(members), float(np.prod(law[list(members)]))


@pytest.mark.equation("grpo-advantage-mean", "grpo-advantage-std", "rloo", "group-baseline")
@pytest.mark.parametrize("kind", ["mean", "rloo", "std"])
def test_which_group_advantages_are_unbiased(kind):
    """Erratum 79: the mean-centred gradient is two thirds of the true one at G = 3, leave-one-out is exact."""
    advantage = {"mean": grpo_advantage_mean, "rloo": rloo_advantage, "std": grpo_advantage_std}[kind]
    logits, _, _, rewards = problem(SMALL)
    sampled = SMALL.token_logprobs(logits)
    by_logprob = np.zeros(SMALL.mask.shape)
    for members, probability in every_group(SMALL, logits, 3):
        live = Tensor(sampled[members], requires_grad=True)
        loss = grpo_loss(live, sampled[members], advantage(rewards[members]), SMALL.mask[members], reduction="seq-sum")
        np.add.at(by_logprob, members, probability * grad(loss.loss, live).data)
    gradient, true = -SMALL.pull(logits, by_logprob), SMALL.policy_gradient(logits, rewards)
    if kind == "std":
        cosine = np.sum(gradient * true) / np.linalg.norm(gradient) / np.linalg.norm(true)
        assert 0.9 < cosine < 1 - 1e-4  # another direction, not only another length
    else:
        np.testing.assert_allclose(gradient, true * {"mean": 2 / 3, "rloo": 1}[kind], atol=1e-14)


@pytest.mark.equation("grpo-loss", "grpo-advantage-std")
def test_the_whole_loss_over_all_groups_equals_enumeration():
    """Old policy, current policy and reference differ; groups of two; clip, KL and standardised advantages."""
    logits, old, reference, _ = problem(SMALL, seed=3)
    rewards = np.array([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0])  # a verifier's: dead groups occur
    current, before, ref = (SMALL.token_logprobs(z) for z in (logits, old, reference))
    ours, oracle = np.zeros(SMALL.mask.shape), np.zeros(SMALL.mask.shape)
    value = expected_value = 0.0
    for members, probability in every_group(SMALL, old, 2):
        r, mask = rewards[members], SMALL.mask[members]
        deviation = np.sqrt(np.mean((r - r.mean()) ** 2))
        loss, by_logprob = scalar_grpo(
            current[members], before[members], ref[members], (r - r.mean()) / (deviation + 1e-6), mask, beta=0.05
        )
        expected_value += probability * loss
        np.add.at(oracle, members, probability * by_logprob)
        live = Tensor(current[members], requires_grad=True)
        result = grpo_loss(live, before[members], grpo_advantage_std(r), mask, ref[members], beta=0.05)
        value += probability * result.loss.item()
        np.add.at(ours, members, probability * grad(result.loss, live).data)
    assert value == pytest.approx(expected_value, abs=1e-14)
    np.testing.assert_allclose(ours, oracle, atol=1e-15)
    live = Tensor(logits, requires_grad=True)
    by_engine = grad(live_logprobs(SMALL, live), live, np.where(SMALL.mask, ours, 0.0)).data
    np.testing.assert_allclose(by_engine, SMALL.pull(logits, oracle), atol=1e-15)


def sequence_kl_gradient(policy: TinyPolicy, logits: np.ndarray, reference: np.ndarray, forward: bool) -> np.ndarray:
    """The gradient of the divergence between the laws of whole responses, by listing them."""
    p, q = policy.probabilities(logits), policy.probabilities(reference)
    weights = -q if forward else p * np.log(p / q)
    return policy.pull(logits, np.broadcast_to(weights[:, None], policy.mask.shape))


@pytest.mark.equation("kl-estimator-k1", "kl-estimator-k2", "kl-estimator-k3", "kl-chain-rule")
def test_values_and_gradients_of_the_estimators_on_whole_responses():
    """Erratum 5: as losses k1 pulls nowhere, k2 along the reverse divergence, k3 along the forward one."""
    logits, _, reference, _ = problem(TINY)
    p, q = TINY.probabilities(logits), TINY.probabilities(reference)
    ref = np.where(TINY.mask, TINY.token_logprobs(reference), 0).sum(-1)
    found = {}
    for kind in ("k1", "k2", "k3"):
        live = Tensor(logits, requires_grad=True)
        response = (live_logprobs(TINY, live) * TINY.mask).sum(-1)
        mean = (kl_estimate(response, ref, kind) * p).sum()
        found[kind] = mean.item(), grad(mean, live).data
    reverse = sequence_kl_gradient(TINY, logits, reference, forward=False)
    forward = sequence_kl_gradient(TINY, logits, reference, forward=True)
    assert np.abs(reverse).max() > 0.1 and np.abs(forward).max() > 0.1
    assert found["k1"][0] == pytest.approx(kl(p, q), abs=1e-14)
    assert found["k3"][0] == pytest.approx(kl(p, q), abs=1e-14)
    assert abs(found["k2"][0] - kl(p, q)) > 0.05
    np.testing.assert_allclose(found["k1"][1], 0, atol=1e-15)
    np.testing.assert_allclose(found["k2"][1], reverse, atol=1e-14)
    np.testing.assert_allclose(found["k3"][1], forward, atol=1e-14)


@pytest.mark.equation("kl-estimator-k2", "kl-estimator-k3", "grpo-loss")
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_per_token_the_gradients_are_those_of_next_word_laws_at_fixed_prefixes(kind):
    """What the loss of GRPO really adds: A = 0 leaves only beta times the estimator."""
    logits, _, reference, _ = problem(TINY)
    current, ref, law = TINY.token_logprobs(logits), TINY.token_logprobs(reference), TINY.probabilities(logits)
    _, gradient = expected(
        TINY,
        logits,
        law,
        lambda lp, i: (
            grpo_loss(lp, current[i], np.zeros(1), TINY.mask[i], ref[i], beta=0.7, kl=kind, reduction="seq-sum").loss
        ),
    )
    p, q = softmax(logits), softmax(reference)
    visits = np.zeros(TINY.n_states)
    np.add.at(visits, TINY.states[TINY.mask], np.broadcast_to(law[:, None], TINY.mask.shape)[TINY.mask])
    log_ratio = np.log(p / q)
    reverse = p * (log_ratio - (p * log_ratio).sum(-1, keepdims=True))
    wanted = {"k1": 0 * p, "k2": reverse, "k3": p - q}[kind]
    np.testing.assert_allclose(gradient, 0.7 * visits[:, None] * wanted, atol=1e-14)


@pytest.mark.equation("grpo-kl-objective", "kl-estimator-is")
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_unclipped_objective_is_reward_minus_reverse_divergence(kind):
    logits, old, reference, rewards = problem(TINY)
    before, ref, law = TINY.token_logprobs(old), TINY.token_logprobs(reference), TINY.probabilities(old)
    value, gradient = expected(
        TINY,
        logits,
        law,
        lambda lp, i: grpo_kl_objective(lp, before[i], rewards[i], TINY.mask[i], ref[i], beta=0.4, kl=kind),
    )
    p, q = TINY.probabilities(logits), TINY.probabilities(reference)
    assert value == pytest.approx(p @ rewards - 0.4 * kl(p, q), abs=1e-13)
    wanted = TINY.policy_gradient(logits, rewards) - 0.4 * sequence_kl_gradient(TINY, logits, reference, False)
    np.testing.assert_allclose(gradient, wanted, atol=1e-13)
