"""Group sampling: shapes, behaviour log-probs, masks and ends, rewards, dead groups."""

import numpy as np
import pytest

from minillm.alignment import response_logprobs, roll_out, roll_out_live
from minillm.functional.advantages import live_groups


@pytest.fixture
def problems(task):
    return task.train_problems[5:17]


@pytest.mark.equation("grpo-group-per-prompt", "rollout-buffer")
def test_the_responses_to_a_prompt_stand_together_and_are_rewarded_one_by_one(policy, task, problems):
    rollout = roll_out(policy, task, problems, 6, np.random.default_rng(0))
    assert rollout.rewards.shape == (12, 6) and rollout.group_size == 6
    for array in (rollout.responses, rollout.old_logprobs, rollout.mask):
        assert array.shape == (72, task.answer_length)
    np.testing.assert_array_equal(rollout.prompts.reshape(12, 6, -1)[:, 3], task.prompt_ids(problems))
    one_by_one = [
        task.verify(problem[None], response[None])[0]
        for problem, response in zip(problems.repeat(6, axis=0), rollout.responses)
    ]
    np.testing.assert_array_equal(rollout.rewards.reshape(-1), one_by_one)
    assert 0.1 < rollout.rewards.mean() < 0.9
    assert len({tuple(r) for r in rollout.responses[:6]}) > 1, "the responses to one prompt must be independent draws"


@pytest.mark.equation("sample-behaviour-logprob")
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_behaviour_log_probs_equal_those_of_reading_the_finished_responses(policy, task, problems, temperature):
    rollout = roll_out(policy, task, problems, 8, np.random.default_rng(1), temperature)
    read = response_logprobs(policy, rollout.prompts, rollout.responses, temperature).data
    np.testing.assert_allclose(rollout.old_logprobs[rollout.mask], read[rollout.mask], rtol=1e-4, atol=1e-5)
    assert rollout.entropy == pytest.approx(-read[rollout.mask].mean(), rel=1e-4)


@pytest.mark.equation("stop-conditions", "done-flags")
def test_the_mask_runs_up_to_and_including_eos_and_nothing_counts_behind_it(untrained, task, problems):
    rollout = roll_out(untrained, task, problems, 20, np.random.default_rng(2))
    is_end = rollout.responses == task.eos_id
    for response, mask, ends, terminated in zip(rollout.responses, rollout.mask, is_end, rollout.terminated):
        length = int(np.argmax(ends)) + 1 if ends.any() else len(response)
        np.testing.assert_array_equal(mask, np.arange(len(response)) < length)
        assert terminated == ends.any()
        assert (response[length:] == task.tokenizer.pad_id).all()
    assert (rollout.old_logprobs[~rollout.mask] == 0).all() and (rollout.old_logprobs[rollout.mask] < 0).all()
    assert not rollout.mask.all() and rollout.terminated.any() and not rollout.terminated.all()
    assert rollout.mean_length == pytest.approx(rollout.mask.sum() / len(rollout.mask))


def test_a_sampled_padding_token_is_an_action_like_any_other(untrained, task, problems):
    rollout = roll_out(untrained, task, problems, 20, np.random.default_rng(2))
    is_pad = rollout.responses == task.tokenizer.pad_id
    assert (is_pad & rollout.mask).any(), "the mask must come from where EOS is, not from the tokens"


def test_a_right_number_without_eos_earns_nothing(task, problems):
    right = task.answer_ids(problems)
    endless = right.copy()
    endless[:, -1] = 0
    assert task.verify(problems, right).all() and not task.verify(problems, endless).any()


def test_responses_that_all_end_at_once_still_fill_the_width(untrained, task, problems):
    """A policy whose stream is constant and whose head always chooses EOS."""
    for name, weights in untrained.state_dict().items():
        if name.endswith(("w_out", "w_down", "head.weight")):
            weights[...] = 0
    untrained.embedding.weight.data[...] = 1.0
    untrained.head.weight.data[task.eos_id] = 2.0
    rollout = roll_out(untrained, task, problems, 3, np.random.default_rng(0))
    assert rollout.responses.shape == (36, task.answer_length)
    np.testing.assert_array_equal(rollout.mask.sum(-1), 1)
    assert rollout.terminated.all() and rollout.dead.all() and rollout.rewards.sum() == 0


def test_the_generator_decides(policy, task, problems):
    first, same, other = (roll_out(policy, task, problems, 4, np.random.default_rng(s)) for s in (0, 0, 1))
    for a, b in zip(first, same):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.responses, other.responses)


def test_groups_can_be_chosen(policy, task, problems):
    rollout = roll_out(policy, task, problems, 5, np.random.default_rng(0))
    some = rollout.groups(np.array([7, 2]))
    np.testing.assert_array_equal(some.rewards, rollout.rewards[[7, 2]])
    np.testing.assert_array_equal(some.responses, np.concatenate([rollout.responses[35:40], rollout.responses[10:15]]))
    np.testing.assert_array_equal(some.prompts[5], rollout.prompts[10])
    assert len(rollout.groups(np.array([], int)).responses) == 0


@pytest.mark.equation("grpo-zero-variance")
def test_the_share_of_dead_groups_is_that_of_groups_with_one_reward(policy, task):
    rollout = roll_out(policy, task, task.train_problems, 4, np.random.default_rng(3))
    np.testing.assert_array_equal(rollout.dead, [len(set(group)) == 1 for group in rollout.rewards])
    assert 0 < rollout.dead.mean() < 1


@pytest.mark.equation("grpo-dynamic-sampling")
def test_sampling_goes_on_until_enough_groups_are_alive_or_the_rounds_are_over(policy, untrained, task):
    lucky = roll_out_live(policy, task, 8, 2, np.random.default_rng(4), most_rounds=50)
    alive = live_groups(lucky.rewards)
    assert len(alive) >= 8 and len(lucky.rewards) % 8 == 0
    assert len(live_groups(lucky.rewards[:-8])) < 8, "the last round must have been needed"
    assert set(lucky.groups(alive).rewards.sum(1)) == {1.0}
    hopeless = roll_out_live(untrained, task, 8, 2, np.random.default_rng(4), most_rounds=3)
    assert len(hopeless.rewards) == 24 and len(hopeless.responses) == 48


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"group_size": 0}, "roll_out: group_size must be a positive integer, got 0"),
        ({"group_size": 2.5}, "roll_out: group_size must be a positive integer, got 2.5"),
        ({"temperature": 0.0}, "roll_out: temperature must be a positive number, got 0.0"),
        ({"problems": np.zeros((0, 2), int)}, "roll_out: the problems must be at least one"),
        ({"problems": np.array([[1, 99]])}, "AdditionTask: problems must be integers"),
    ],
)
def test_what_cannot_be_sampled_is_refused(policy, task, problems, change, complaint):
    options = {"problems": problems, "group_size": 2, "rng": np.random.default_rng(0), **change}
    with pytest.raises(ValueError, match=complaint):
        roll_out(policy, task, **options)


@pytest.mark.parametrize("name", ["n_groups", "most_rounds"])
def test_counts_of_dynamic_sampling_are_positive(policy, task, name):
    options = {"n_groups": 2, "most_rounds": 2, name: 0}
    with pytest.raises(ValueError, match=f"roll_out_live: {name} must be a positive integer, got 0"):
        roll_out_live(policy, task, group_size=2, rng=np.random.default_rng(0), **options)
