"""The policy: logits and log-probs of responses, accuracy, copies."""

import numpy as np
import pytest

from minillm.alignment import PolicySize, accuracy, fresh_policy, frozen_copy, response_logits, response_logprobs
from minillm.autograd import Tensor, grad
from minillm.functional.softmax import log_softmax


@pytest.fixture
def answers(task):
    problems = task.train_problems[:7]
    return task.prompt_ids(problems), task.answer_ids(problems)


def test_the_default_policy_has_about_a_tenth_of_a_million_parameters(task):
    assert 95_000 < fresh_policy(task, PolicySize(), np.random.default_rng(0)).count_parameters() < 105_000


@pytest.mark.equation("init-schemes")
def test_maps_are_spread_by_the_fan_in_rule_and_the_token_table_as_usual(task):
    weights = fresh_policy(task, PolicySize(), np.random.default_rng(0)).state_dict()
    assert weights["blocks.0.attention.w_qkv"].std() == pytest.approx(64**-0.5, rel=0.05)
    assert weights["blocks.1.ffn.w_down"].std() == pytest.approx(64**-0.5 / 2, rel=0.05)
    assert weights["embedding.weight"].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.equation("lm-as-mdp")
def test_logits_of_a_response_are_those_of_the_whole_text_from_the_last_prompt_token_on(policy, answers):
    prompts, responses = answers
    everything = policy(np.concatenate([prompts, responses], axis=1)).data
    found = response_logits(policy, prompts, responses).data
    np.testing.assert_allclose(found, everything[:, prompts.shape[1] - 1 : -1], rtol=1e-5, atol=1e-5)


@pytest.mark.equation("gather-logprob", "policy-sequence")
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_log_probs_are_those_of_the_softmax_at_the_temperature(policy, answers, temperature):
    prompts, responses = answers
    logits = response_logits(policy, prompts, responses).data.astype(np.float64) / temperature
    expected = np.take_along_axis(log_softmax(Tensor(logits)).data, responses[..., None], -1)[..., 0]
    found = response_logprobs(policy, prompts, responses, temperature)
    np.testing.assert_allclose(found.data, expected, rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32


def test_the_last_token_of_a_response_is_scored_and_never_read(policy, answers):
    prompts, responses = answers
    changed = responses.copy()
    changed[:, -1] = 3
    first, second = (response_logits(policy, prompts, r).data for r in (responses, changed))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(*(response_logprobs(policy, prompts, r).data[:, -1] for r in (responses, changed)))


def test_each_response_needs_its_prompt(policy, answers):
    with pytest.raises(ValueError, match=r"the responses must be 7 rows, one a prompt, got shape \(3, 3\)"):
        response_logits(policy, answers[0], answers[1][:3])


def test_an_untrained_policy_is_hardly_ever_right_and_the_clerk_knows_but_is_careless(untrained, policy, skill):
    before, after = skill(untrained), skill(policy)
    assert before.sampled < 0.02
    assert after.greedy > 0.7 and 0.2 < after.sampled < 0.6


def test_greedy_accuracy_needs_no_luck(policy, task):
    first, second = (accuracy(policy, task, task.train_problems, np.random.default_rng(seed)) for seed in (1, 2))
    assert first.greedy == second.greedy and first.sampled != second.sampled


def test_training_the_original_does_not_move_a_frozen_copy(policy, answers):
    copy = frozen_copy(policy)
    for parameter in policy.parameters():
        parameter.data += 1.0
    loss = response_logprobs(policy, *answers).sum()
    assert all(np.isfinite(g.data).all() for g in grad(loss, policy.parameters()))
    assert not any(np.array_equal(a, b) for a, b in zip(copy.state_dict().values(), policy.state_dict().values()))
