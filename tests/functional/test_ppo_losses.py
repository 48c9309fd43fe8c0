"""PPO's parts: actor, critic, bonus, shaped reward, and the monitors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import critic_losses as critic
from minillm.functional import policy_monitors as monitor
from minillm.functional import ppo_losses as ppo
from minillm.functional.information import entropy_from_logits, kl_token_exact
from minillm.functional.policy_losses import grpo_loss
from minillm.functional.reductions import aggregate
from minillm.functional.returns import gae, value_target
from tests.oracles import tiny_policies as law

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, B: int = 3, V: int = 4):
    rng = np.random.default_rng(seed)
    T = int(rng.integers(1, 6))
    mask = np.arange(T) < rng.integers(1, T + 1, size=(B, 1))
    new = rng.uniform(-3, -0.1, size=(B, T))
    return new, new + 0.5 * rng.normal(size=(B, T)), rng.normal(size=(B, T)), mask, rng.normal(size=(2, B, T, V))


@pytest.mark.equation("ppo-clip", "ppo-lm-loss")
@given(seed=seeds)
@settings(max_examples=25)
def test_the_loss_is_minus_the_objective_and_the_reduction_is_a_switch(seed):
    """Errata 71 and 77. With one advantage per response and the response mean it is GRPO's policy term."""
    new, old, a, mask, _ = draw(seed)
    objective = ppo.ppo_clip_objective(new, old, a, mask).item()
    ratio = np.exp(new - old)
    terms = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    assert objective == pytest.approx(terms[mask].mean())
    assert ppo.ppo_lm_loss(new, old, a, mask).item() == -objective
    by_response = ppo.ppo_lm_loss(new, old, a[:, 0], mask, reduction="seq-mean").item()
    assert by_response == pytest.approx(grpo_loss(new, old, a[:, 0], mask).policy_loss)


@pytest.mark.equation("ppo-degenerate", "surrogate-objective", "ppo-clip")
@given(seed=seeds)
@settings(max_examples=20)
def test_with_one_update_per_batch_the_clip_is_idle(seed):
    new, _, a, mask, _ = draw(seed)
    slopes = []
    for objective in (ppo.ppo_clip_objective, ppo.surrogate_objective):
        live = Tensor(new, requires_grad=True)
        slopes.append(grad(objective(live, new, a, mask), live).data)
    np.testing.assert_allclose(slopes[0], np.where(mask, a / mask.sum(), 0), atol=1e-15)
    np.testing.assert_allclose(slopes[0], slopes[1], atol=1e-15)


@pytest.mark.equation("ppo-kl-loss", "ppo-kl-orig")
@given(seed=seeds, direction=st.sampled_from(["reverse", "forward"]))
@settings(max_examples=20)
def test_the_kl_penalty_is_over_the_whole_vocabulary_in_the_direction_asked_for(seed, direction):
    new, old, a, mask, (logits, ref) = draw(seed)
    spoilt = np.where(mask[..., None], logits, np.nan)
    live = Tensor(spoilt, requires_grad=True)
    loss = ppo.ppo_kl_loss(Tensor(new), live, old, a, mask, ref, beta=0.3, direction=direction)
    penalty = kl_token_exact(Tensor(logits), Tensor(ref), direction).data[mask].mean()
    assert loss.item() == pytest.approx(ppo.ppo_lm_loss(new, old, a, mask).item() + 0.3 * penalty)
    gradient = grad(loss, live).data
    p, q = law.softmax(logits), law.softmax(ref)
    reverse = p * (np.log(p / q) - (p * np.log(p / q)).sum(-1, keepdims=True))
    wanted = 0.3 / mask.sum() * (reverse if direction == "reverse" else p - q)
    np.testing.assert_allclose(gradient, np.where(mask[..., None], wanted, 0), atol=1e-14)


@pytest.mark.equation("entropy-bonus", "ppo-total")
def test_the_bonus_flattens_the_policy_and_the_total_has_the_right_signs():
    logits = Tensor(np.array([[[2.0, 0.0, -1.0], [np.nan] * 3]]), requires_grad=True)
    mask = np.array([[1, 0]])
    bonus = ppo.entropy_bonus(logits, mask)
    assert bonus.item() == pytest.approx(entropy_from_logits(Tensor(np.array([2.0, 0.0, -1.0]))).item())
    step = grad(bonus, logits).data
    assert step[0, 0, 0] < 0 < step[0, 0, 1] and (step[0, 1] == 0).all()
    actor, value, entropy, kl = (Tensor(np.array(x), requires_grad=True) for x in (2.0, 3.0, 5.0, 7.0))
    total = ppo.ppo_total_loss(actor, value, entropy, kl, critic_coef=0.5, entropy_coef=0.01, kl_coef=0.1)
    assert total.item() == pytest.approx(-(2 - 0.5 * 3 + 0.01 * 5 - 0.1 * 7))
    slopes = [g.item() for g in grad(total, [actor, value, entropy, kl])]
    assert slopes == pytest.approx([-1, 0.5, -0.01, 0.1])
    assert ppo.ppo_total_loss(actor, value, entropy).item() == pytest.approx(-0.55)


@pytest.mark.equation("kl-shaped-reward")
def test_the_score_comes_last_and_being_likelier_than_the_reference_costs():
    """Errata 69 and 70: frozen at roll-out; negative iff the policy is likelier than the reference."""
    old, ref = Tensor(np.log([[0.5, 0.2, 0.9], [0.3, 0.3, 0.3]]), requires_grad=True), np.log([[0.25, 0.4, 0.1]] * 2)
    mask = np.array([[1, 1, 0], [0, 0, 0]])
    rewards = ppo.kl_shaped_reward(np.array([2.0, 5.0]), old, ref, mask, beta=0.1)
    assert isinstance(rewards, np.ndarray)
    np.testing.assert_allclose(rewards[0], [-0.1 * np.log(2), 0.1 * np.log(2) + 2.0, 0])
    np.testing.assert_array_equal(rewards[1], 0)
    holes = ppo.kl_shaped_reward(np.array([1.0]), np.zeros((1, 4)), np.zeros((1, 4)), np.array([[0, 1, 0, 1]]), 0.1)
    np.testing.assert_array_equal(holes, [[0, 0, 0, 1.0]])


@pytest.mark.equation("kl-shaped-reward", "kl-chain-rule", "rlhf-objective")
def test_in_mean_the_shaped_rewards_sum_to_the_regularised_objective():
    policy = law.TinyPolicy(longest=3)
    logits, reference = np.random.default_rng(0).normal(size=(2, policy.n_states, 3))
    scores = np.random.default_rng(1).normal(size=len(policy.responses))
    p, q = policy.probabilities(logits), policy.probabilities(reference)
    rewards = ppo.kl_shaped_reward(
        scores, policy.token_logprobs(logits), policy.token_logprobs(reference), policy.mask, beta=0.3
    )
    divergence = law.kl(p, q)
    assert p @ rewards.sum(-1) == pytest.approx(p @ scores - 0.3 * divergence)
    monitored = ppo.rlhf_objective(np.array([p @ scores]), np.array([divergence]), 0.3)
    assert monitored == pytest.approx(p @ scores - 0.3 * divergence)


@pytest.mark.equation("critic-loss", "value-target")
@given(seed=seeds)
@settings(max_examples=20)
def test_the_critic_regresses_on_frozen_targets(seed):
    new, _, a, mask, _ = draw(seed)
    values, targets = Tensor(new, requires_grad=True), Tensor(a, requires_grad=True)
    loss = critic.critic_loss(values, targets, mask)
    assert loss.item() == pytest.approx(((new - a)[mask] ** 2).mean())
    slope, none = grad(loss, [values, targets], allow_unused=True)
    assert none is None
    np.testing.assert_allclose(slope.data, np.where(mask, 2 * (new - a) / mask.sum(), 0), atol=1e-14)
    nothing = critic.critic_loss(np.full((2, 2), np.nan), np.full((2, 2), np.nan), np.zeros((2, 2)))
    assert nothing.item() == 0


@pytest.mark.equation("critic-loss-rm", "critic-loss", "value-target")
def test_the_lectures_critic_is_the_monte_carlo_target_without_discount_and_penalty():
    """Erratum 58: with the score at the end only, the return from every token is that score."""
    rng = np.random.default_rng(0)
    values, scores = rng.normal(size=(3, 4)), rng.normal(size=3)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    rewards = ppo.kl_shaped_reward(scores, np.zeros((3, 4)), np.zeros((3, 4)), mask, beta=0.0)
    targets = value_target(gae(rewards, values, gamma=1.0, lam=1.0, mask=mask), values)
    assert critic.critic_loss_rm(values, scores, mask).item() == pytest.approx(
        critic.critic_loss(values, targets, mask).item()
    )


@pytest.mark.equation("value-clip", "critic-loss")
@given(seed=seeds)
@settings(max_examples=30)
def test_the_clipped_critic_is_the_pessimistic_one_and_equal_while_close(seed):
    new, old, a, mask, _ = draw(seed)
    clipped = critic.clipped_critic_loss(new, a, old, mask, clip=0.2).item()
    moved = old + np.clip(new - old, -0.2, 0.2)
    expected = np.maximum((new - a) ** 2, (moved - a) ** 2)[mask].mean()
    assert clipped == pytest.approx(expected) and clipped >= critic.critic_loss(new, a, mask).item() - 1e-12
    near = old + np.clip(new - old, -0.19, 0.19)
    assert critic.clipped_critic_loss(near, a, old, mask).item() == pytest.approx(
        critic.critic_loss(near, a, mask).item()
    )


@pytest.mark.equation("value-clip")
def test_a_value_that_ran_away_towards_its_target_gets_no_further_pull():
    value = Tensor(np.array([[1.0, 1.0]]), requires_grad=True)
    loss = critic.clipped_critic_loss(value, np.array([[2.0, -2.0]]), np.zeros((1, 2)), np.ones((1, 2)), clip=0.2)
    np.testing.assert_allclose(grad(loss, value).data, [[0, 3.0]])  # towards: none; away: in full


@pytest.mark.equation("ppo-per-token", "ppo-gradient-region")
def test_a_traced_response():
    old, new = np.log([0.1, 0.5, 0.4]), np.log([0.3, 0.25, 0.44])
    trace = monitor.ppo_token_trace(new, old, np.array([1.0, -1.0, 1.0]))
    np.testing.assert_allclose(trace.ratio, [3, 0.5, 1.1])
    assert trace.clipped.tolist() == [True, True, False]
    np.testing.assert_allclose(trace.term, [1.2, -0.8, 1.1])
    np.testing.assert_allclose(trace.logprob, new)


@pytest.mark.equation("ppo-early-stop", "trpo-kl-sample")
def test_the_two_estimates_of_how_far_the_policy_moved_are_unbiased():
    old, new = law.softmax(law.LOGITS_P), law.softmax(law.LOGITS_OTHER)
    far = law.kl(old, new)
    per_action = [
        (
            monitor.ppo_early_stop(np.log([[n]]), np.log([[o]]), np.ones((1, 1)), target=1.0).kl,
            monitor.trpo_kl_sample(np.log([[n]]), np.log([[o]]), np.ones((1, 1))).item(),
        )
        for n, o in zip(new, old)
    ]
    assert old @ np.array(per_action) == pytest.approx([far, far]) and min(k for k, _ in per_action) >= 0
    first = monitor.ppo_early_stop(np.log([new]), np.log([new]), np.ones((1, 5)), target=1e-9)
    assert first == (0.0, False)
    moved = monitor.ppo_early_stop(np.log([new]), np.log([old]), np.ones((1, 5)), target=1e-3)
    assert moved.stop and moved.kl > 1e-3


@pytest.mark.equation("trpo-kl-sample", "surrogate-objective")
@given(seed=seeds)
@settings(max_examples=15)
def test_masked_steps_do_not_count(seed):
    new, old, a, mask, _ = draw(seed)
    spoilt = [np.where(mask, x, np.nan) for x in (new, old, a)]
    assert ppo.surrogate_objective(*spoilt, mask).item() == pytest.approx(aggregate(np.exp(new - old) * a, mask).item())
    assert monitor.trpo_kl_sample(*spoilt[:2], mask).item() == pytest.approx((old - new)[mask].mean())
    stop = monitor.ppo_early_stop(*spoilt[:2], mask, target=1.0)
    assert stop.kl == pytest.approx((np.exp(new - old) - 1 - (new - old))[mask].mean())


ONE = np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ppo.surrogate_objective(ONE, ONE, np.ones(3), ONE), "advantages must be of shape"),
        (lambda: ppo.ppo_lm_loss(ONE, ONE, ONE, ONE, reduction="median"), "reduction must be one of"),
        (lambda: ppo.kl_shaped_reward(np.ones(3), ONE, ONE, ONE, 0.1), "scores must be of shape"),
        (lambda: ppo.entropy_bonus(Tensor(np.ones((2, 3, 4))), np.ones((2, 2))), "mask must be of the terms'"),
        (lambda: critic.critic_loss(ONE, ONE[:, :2], ONE), "targets must be of shape"),
        (lambda: critic.critic_loss_rm(ONE, np.ones(3), ONE), "scores must be of shape"),
        (lambda: critic.clipped_critic_loss(ONE, ONE, ONE, ONE, clip=0.0), "clip must be a positive"),
        (lambda: monitor.ppo_early_stop(ONE, ONE, ONE, target=0.0), "target must be a positive"),
        (lambda: monitor.ppo_token_trace(ONE[0], ONE[0, :2], ONE[0]), "old_logprobs must be of shape"),
    ],
)
def test_errors_say_what_is_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
