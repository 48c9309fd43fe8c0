"""The GRPO loop: its loss, its gradient, what it learns, what it leaves alone."""

import numpy as np
import pytest

from minillm.alignment import GRPO, GRPOConfig, frozen_copy, response_logprobs
from minillm.functional.advantages import grpo_advantage_std, live_groups
from minillm.functional.policy_losses import grpo_loss
from minillm.training.step import loss_and_gradients

QUICK = {"updates": 30, "lr": 2e-3, "prompts": 8, "group": 8, "evaluate_every": 0, "threads": 1}


def stage_of(policy, task, **settings) -> GRPO:
    return GRPO(policy, task, GRPOConfig(**{**QUICK, **settings}))


def weights_of(stage) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in stage.model.state_dict().values()])


def mixed_rollout(stage):
    """A rollout with groups of both kinds: some whose rewards are all equal, some whose are not."""
    for _ in range(20):
        rollout = stage.sample()
        if 0 < rollout.dead.mean() < 1:
            return rollout
    raise AssertionError("20 rollouts, and in none of them are some groups dead and some alive")


def advantages_of(rollout) -> np.ndarray:
    return grpo_advantage_std(rollout.rewards).astype(np.float32).reshape(-1)


@pytest.mark.equation("grpo-loss")
def test_a_short_run_makes_the_policy_right_more_often(policy, task, skill):
    before = skill(policy)
    history = stage_of(policy, task).run()
    after = skill(policy)
    assert after.sampled > before.sampled + 0.12
    assert np.mean([m["reward"] for m in history[-8:]]) > np.mean([m["reward"] for m in history[:8]]) + 0.1
    assert history[-1]["entropy"] < history[0]["entropy"]
    wanted = {
        "step",
        "lr",
        "reward",
        "dead_groups",
        "entropy",
        "length",
        "loss",
        "gradient_norm",
        "kl_old",
        "clip_fraction",
    }
    assert all(set(metrics) == wanted for metrics in history)


@pytest.mark.equation("grpo-loss", "loss-aggregation")
@pytest.mark.parametrize("reduction", ["seq-mean", "token-mean", "seq-sum", "constant", "sum"])
def test_a_step_follows_the_loss_of_all_responses_dead_groups_included(policy, task, reduction):
    """Leaving out responses without advantage, and cutting the rest into shares, changes neither loss nor gradient."""
    stage = stage_of(policy, task, reduction=reduction, threads=3, group=3)
    rollout = mixed_rollout(stage)
    advantages = advantages_of(rollout)
    logprobs = response_logprobs(policy, rollout.prompts, rollout.responses)
    # A ratio of its own for every token: with one for all, the advantages of a group would add up to a loss of zero.
    drift = np.random.default_rng(7).normal(0.0, 0.1, rollout.old_logprobs.shape).astype(np.float32)
    old = rollout.old_logprobs - drift
    whole = grpo_loss(logprobs, old, advantages, rollout.mask, reduction=reduction, length=task.answer_length).loss
    loss, gradients = loss_and_gradients(whole, policy.parameters())
    with stage.threads.running():
        taken = stage.step(rollout._replace(old_logprobs=old), advantages, np.arange(len(advantages)))
    assert abs(loss) > 1e-3
    assert taken["loss"] == pytest.approx(loss, rel=1e-3)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients))
    assert taken["gradient_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.equation("grpo-zero-variance", "grpo-advantage-std")
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_groups_with_equal_rewards_move_nothing(policy, task, reward):
    stage = stage_of(policy, task)
    rollout = stage.sample()
    rollout.rewards[...] = reward
    before = weights_of(stage).copy()
    advantages = advantages_of(rollout)
    assert (advantages == 0).all()
    taken = stage.step(rollout, advantages, np.arange(len(advantages)))
    assert taken["gradient_norm"] == 0.0 and taken["loss"] == 0.0
    np.testing.assert_array_equal(weights_of(stage), before)


@pytest.mark.equation("importance-ratio", "grpo-ratio-token")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_step_on_a_rollout_has_ratio_one_and_later_ones_do_not(policy, task, temperature):
    once = stage_of(frozen_copy(policy), task, updates=1, epochs=1, temperature=temperature).run()[0]
    assert abs(once["kl_old"]) < 1e-6 and once["clip_fraction"] == 0.0
    assert once["loss"] == pytest.approx(0.0, abs=1e-4), (
        "with ratio 1 the loss is the mean advantage, its gradient is not"
    )
    assert once["gradient_norm"] > 0.1
    often = stage_of(policy, task, updates=1, epochs=6, lr=5e-3, temperature=temperature).run()[0]
    assert often["kl_old"] > 1e-3 and often["clip_fraction"] > 0.01


def test_a_pass_over_a_rollout_takes_one_step_for_each_minibatch(policy, task):
    stage = stage_of(policy, task, updates=3, epochs=2, minibatches=4)
    stage.run()
    assert stage.optimizer.t == 3 * 2 * 4


@pytest.mark.equation("grpo-loss", "kl-estimator-k3")
def test_the_reference_stays_and_a_penalty_holds_the_policy_near_it(policy, task):
    start = weights_of(stage_of(policy, task)).copy()
    ends = {}
    for beta in (0.01, 3.0):
        stage = stage_of(frozen_copy(policy), task, updates=12, lr=1e-3, beta=beta)
        history = stage.run()
        reference = np.concatenate([a.reshape(-1) for a in stage.reference.state_dict().values()])
        np.testing.assert_array_equal(reference, start)
        ends[beta] = history[-1]["kl_reference"]
    assert ends[3.0] < 0.5 * ends[0.01]


def test_with_a_penalty_dead_groups_still_pull_towards_the_reference(policy, task):
    stage = stage_of(policy, task, beta=0.5)
    for parameter in policy.parameters():
        parameter.data *= 1.05
    rollout = stage.sample()
    rollout.rewards[...] = 1.0
    taken = stage.step(rollout, advantages_of(rollout), np.arange(len(rollout.responses)))
    assert taken["gradient_norm"] > 0 and taken["kl_reference"] > 0


@pytest.mark.equation("grpo-dynamic-sampling")
def test_dropping_dead_groups_changes_the_length_of_the_gradient_and_not_its_direction(policy, task):
    stage = stage_of(policy, task, max_norm=1e9, epochs=1)
    rollout = mixed_rollout(stage)
    alive = rollout.groups(live_groups(rollout.rewards))
    share = len(alive.rewards) / len(rollout.rewards)
    gradients = []
    for some in (rollout, alive):
        logprobs = response_logprobs(policy, some.prompts, some.responses)
        loss = grpo_loss(logprobs, some.old_logprobs, advantages_of(some), some.mask).loss
        gradients.append(np.concatenate([g.reshape(-1) for g in loss_and_gradients(loss, policy.parameters())[1]]))
    np.testing.assert_allclose(gradients[0], share * gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.equation("grpo-dynamic-sampling")
def test_dynamic_sampling_trains_on_live_groups_and_reports_all_that_it_saw(policy, task):
    seen = []
    stage = stage_of(policy, task, updates=4, dynamic_sampling=True, group=2)
    step = stage.step
    stage.step = lambda rollout, advantages, rows: (seen.append(rollout), step(rollout, advantages, rows))[1]
    history = stage.run()
    assert all(not rollout.dead.any() and len(rollout.rewards) <= 8 for rollout in seen)
    assert all(0 < metrics["dead_groups"] < 1 for metrics in history)


@pytest.mark.equation("grpo-zero-variance")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_policy_that_is_never_right_learns_nothing(untrained, task, dynamic):
    untrained.head.weight.data[task.eos_id] = 0
    untrained.final_norm.gain.data[...] = 0  # every token alike: right once in 15 ** 3
    stage = stage_of(untrained, task, updates=2, prompts=2, group=2, dynamic_sampling=dynamic)
    before = weights_of(stage).copy()
    assert [m["dead_groups"] for m in stage.run()] == [1.0, 1.0]
    np.testing.assert_array_equal(weights_of(stage), before)


@pytest.mark.parametrize("advantage", ["std", "mean", "rloo", "batch-std"])
def test_every_advantage_runs(policy, task, advantage):
    metrics = stage_of(policy, task, updates=1, advantage=advantage, ddof=1, eps=1e-4).run()[0]
    assert metrics["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"group": 1}, "GRPOConfig: group must be at least 2: a response is compared with its group, got 1"),
        ({"group": 0}, "GRPOConfig: group must be a positive integer, got 0"),
        ({"prompts": 0}, "GRPOConfig: prompts must be a positive integer"),
        ({"epochs": 0}, "GRPOConfig: epochs must be a positive integer"),
        ({"prompts": 2, "group": 2, "minibatches": 5}, "minibatches must be at most the number of responses, 4, got 5"),
        ({"temperature": 0.0}, "GRPOConfig: temperature must be a positive number"),
        ({"eps": -1e-9}, "GRPOConfig: eps must be a non-negative number"),
        ({"clip_low": -0.1}, "GRPOConfig: clip_low must be in"),
        ({"clip_low": 1.1}, "GRPOConfig: clip_low must be in"),
        ({"clip_high": -0.1}, "GRPOConfig: clip_high must be a non-negative number"),
        ({"beta": -1.0}, "GRPOConfig: beta must be a non-negative number"),
        ({"advantage": "z"}, "GRPOConfig: advantage must be one of 'std', 'mean', 'rloo', 'batch-std', got z"),
        ({"kl": "k4"}, "GRPOConfig: kl must be one of 'k1', 'k2', 'k3', got k4"),
        ({"reduction": "mean"}, "GRPOConfig: reduction must be one of"),
        ({"ddof": 2}, "GRPOConfig: ddof must be 0 or 1, got 2"),
        ({"lr": float("nan")}, "GRPOConfig: lr must be a positive number, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        GRPOConfig(**settings)
