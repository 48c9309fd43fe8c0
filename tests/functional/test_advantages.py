"""Group advantages: the documents' figures, what is invariant, dead groups, whitening."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.functional import advantages as adv
from minillm.functional.softmax import softmax
from tests.oracles import tiny_policies as law

seeds = st.integers(0, 2**32 - 1)


@pytest.mark.equation("wn-100-responses", "grpo-100-example", "grpo-advantage-mean", "group-baseline")
def test_a_hundred_answers_thirty_of_them_right():
    rewards = np.array([1.0] * 30 + [0.0] * 70)
    advantages = adv.grpo_advantage_mean(rewards)
    np.testing.assert_allclose(advantages[:30], 0.7)
    np.testing.assert_allclose(advantages[30:], -0.3)
    assert advantages.sum() == pytest.approx(0, abs=1e-12) and adv.group_baseline(rewards).item() == 0.3


@pytest.mark.equation("wn-advantage", "wn-step-rewards")
def test_the_lectures_two_actions():
    """0.9 - 0.6 and 0.2 - 0.6: a baseline of 0.6 is the mean under probabilities 4/7 and 3/7."""
    q, v = np.array([0.9, 0.2]), 0.6
    policy = np.array([4, 3]) / 7
    assert policy @ q == pytest.approx(v)
    advantages = q - v
    assert advantages == pytest.approx([0.3, -0.4]) and policy @ advantages == pytest.approx(0, abs=1e-15)
    seven = np.repeat(q, [4, 3])  # seven samples in those shares: the group mean is that baseline
    np.testing.assert_allclose(adv.grpo_advantage_mean(seven), np.repeat([0.3, -0.4], [4, 3]))


@pytest.mark.equation("wn-reward-example", "wn-bt-sigmoid")
def test_the_lectures_two_rewards_as_a_preference():
    better, worse = Tensor(np.array(8.0)), Tensor(np.array(1.2))
    preference = (better - worse).sigmoid()
    assert preference.item() == pytest.approx(0.99888746, abs=5e-9)
    assert -preference.log().item() == pytest.approx(0.00111316, abs=5e-9)
    assert softmax(Tensor(np.array([8.0, 1.2]))).data[0] == pytest.approx(preference.item(), abs=1e-15)


@pytest.mark.equation("group-stats", "wn-noisy-ratings", "wn-ranking")
def test_the_lectures_noisy_ratings():
    ratings = np.array([4.1, 6.6, 3.2])
    population, sample = adv.group_stats(ratings), adv.group_stats(ratings, ddof=1)
    assert population.mean.item() == pytest.approx(4.6333, abs=5e-5)
    assert population.std.item() == pytest.approx(1.4384, abs=5e-5)
    assert sample.std.item() == pytest.approx(1.7616, abs=5e-5)
    assert 8.0 > population.mean.item() > 1.2  # y1 before y3 before y2


@pytest.mark.equation("grpo-advantage-std", "grpo-advantage-mean", "rloo")
@given(seed=seeds, scale=st.floats(0.1, 50), shift=st.floats(-20, 20))
@settings(max_examples=40)
def test_what_shifting_scaling_and_permuting_rewards_does(seed, scale, shift):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(3, int(rng.integers(2, 7))))
    order = rng.permutation(rewards.shape[1])
    for kind in adv.ADVANTAGES:
        a = adv.group_advantage(rewards, kind, eps=0)
        np.testing.assert_allclose(a.sum(-1), 0, atol=1e-11)
        factor = scale if kind in ("mean", "rloo") else 1.0
        moved = adv.group_advantage(scale * rewards + shift, kind, eps=0)
        np.testing.assert_allclose(moved, factor * a, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(
            adv.group_advantage(rewards[:, order], kind), adv.group_advantage(rewards, kind)[:, order], atol=1e-12
        )
    np.testing.assert_allclose(adv.grpo_advantage_std(rewards, eps=0).std(-1), 1, rtol=1e-9)
    others = np.stack([np.delete(rewards, i, axis=1).mean(1) for i in range(rewards.shape[1])], axis=1)
    np.testing.assert_allclose(adv.rloo_advantage(rewards), rewards - others, atol=1e-12)


@pytest.mark.equation("grpo-advantage-std")
def test_population_or_sample_deviation_differ_by_what_the_libraries_differ():
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    ratio = adv.grpo_advantage_std(rewards, eps=0) / adv.grpo_advantage_std(rewards, ddof=1, eps=0)
    np.testing.assert_allclose(ratio, np.sqrt(4 / 3))  # 15 per cent at G = 4, 41 at G = 2
    pair = adv.grpo_advantage_std(rewards[:2], eps=0) / adv.grpo_advantage_std(rewards[:2], ddof=1, eps=0)
    np.testing.assert_allclose(pair, np.sqrt(2))


@pytest.mark.equation("grpo-advantage-std")
def test_the_batchs_deviation_is_one_number_for_all_groups():
    rewards = np.array([[1.0, 0.0], [3.0, 3.0]])
    found = adv.group_advantage(rewards, "batch-std", ddof=1, eps=0.5)
    np.testing.assert_allclose(found, [[0.5, -0.5], [0, 0]] / (rewards.std(ddof=1) + 0.5))


@pytest.mark.equation("grpo-advantage-std", "grpo-zero-variance")
def test_equal_rewards_give_zero_and_rounding_noise_stays_noise():
    """Erratum 78: without a stabiliser this is 0/0; with one of 1e-9 noise in the last bit is blown up."""
    assert (adv.grpo_advantage_std(np.full((2, 4), 0.7)) == 0).all()
    assert (adv.grpo_advantage_std(np.ones((2, 4)), eps=0) == 0).all()
    noisy = np.array([0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2])
    assert np.abs(adv.grpo_advantage_std(noisy)).max() < 1e-9
    assert np.abs(adv.grpo_advantage_std(noisy, eps=0)).max() > 0.5
    assert adv.dead_groups(noisy)
    assert (adv.grpo_advantage_std(np.array([[3.0]])) == 0).all()


@pytest.mark.equation("grpo-advantage-mean", "rloo", "grpo-advantage-std")
def test_the_factors_of_erratum_79():
    """Exact expectation over all groups of three from the five-action law."""
    p = law.softmax(law.LOGITS_P)
    scores = np.eye(5) - p
    true = p * (law.REWARDS - p @ law.REWARDS)
    found = {kind: np.zeros(5) for kind in ("mean", "rloo", "std")}
    for group in itertools.product(range(5), repeat=3):
        members = list(group)
        for kind, total in found.items():
            a = adv.group_advantage(law.REWARDS[members], kind)
            total += np.prod(p[members]) * (a[:, None] * scores[members]).mean(0)
    np.testing.assert_allclose(found["mean"] / true, 0.666667, atol=1e-6)
    np.testing.assert_allclose(found["rloo"] / true, 1, atol=1e-12)
    np.testing.assert_allclose(found["std"] / true, [1.80, 1.59, 2.56, 1.71, -0.74], atol=6e-3)
    cosine = found["std"] @ true / np.linalg.norm(found["std"]) / np.linalg.norm(true)
    assert cosine == pytest.approx(0.9978, abs=5e-5)


@pytest.mark.equation("grpo-zero-variance", "grpo-dynamic-sampling")
def test_dead_groups_are_counted_as_expected_and_dropped():
    rng = np.random.default_rng(0)
    rewards = (rng.random((20_000, 4)) < 0.3).astype(float)
    share = adv.dead_groups(rewards).mean()
    expected = adv.expected_dead_share(0.3, 4)
    assert expected == pytest.approx(0.3**4 + 0.7**4) and share == pytest.approx(expected, abs=0.01)
    kept = adv.live_groups(rewards)
    assert len(kept) / 20_000 == pytest.approx(1 - expected, abs=0.01)
    sums = rewards[kept].sum(-1)
    assert ((sums > 0) & (sums < 4)).all() and (np.diff(kept) > 0).all()
    assert adv.live_groups(np.ones((3, 2))).size == 0


@pytest.mark.equation("advantage-whitening")
@given(seed=seeds)
@settings(max_examples=30)
def test_whitening_over_real_tokens(seed):
    rng = np.random.default_rng(seed)
    a, mask = 5 + 3 * rng.normal(size=(4, 6)), rng.random((4, 6)) < 0.6
    mask[0, :2] = True
    white = adv.advantage_whitening(np.where(mask, a, np.nan), mask)
    assert (white[~mask] == 0).all()
    assert white[mask].mean() == pytest.approx(0, abs=1e-9) and white[mask].std() == pytest.approx(1, abs=1e-6)
    scaled = adv.advantage_whitening(a, mask, shift_mean=False)
    np.testing.assert_allclose(scaled[mask], a[mask] / (a[mask].std() + 1e-8))
    damped = adv.advantage_whitening(a, mask, eps=0.5)
    np.testing.assert_allclose(damped[mask], (a[mask] - a[mask].mean()) / (a[mask].std() + 0.5))
    assert (adv.advantage_whitening(a, np.zeros_like(mask)) == 0).all()
    assert (adv.advantage_whitening(a[:1, :1], mask[:1, :1], ddof=1) == 0).all()


@pytest.mark.equation("grpo-gae-hybrid")
def test_the_hybrid_lies_between_its_parts():
    group, token = np.array([1.0, -1.0]), np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(adv.hybrid_advantage(group, token, 0.0), token)
    np.testing.assert_array_equal(adv.hybrid_advantage(group, token, 1.0), group[:, None] * np.ones((2, 3)))
    np.testing.assert_allclose(adv.hybrid_advantage(group, token, 0.25)[1, 2], 0.25 * -1 + 0.75 * 5)


def test_integers_and_booleans_are_rewards_too_and_single_precision_stays():
    assert adv.grpo_advantage_mean(np.array([1, 0, 0, 1])).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert adv.grpo_advantage_std(np.ones((2, 2), np.float32)).dtype == np.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adv.grpo_advantage_std(np.array([1.0, np.nan])), "rewards must be finite"),
        (lambda: adv.group_baseline(np.zeros((2, 0))), "with G at least 1"),
        (lambda: adv.grpo_advantage_std(np.ones((2, 1)), ddof=1), "more than ddof = 1"),
        (lambda: adv.rloo_advantage(np.ones((2, 1))), "at least 2"),
        (lambda: adv.grpo_advantage_std(np.ones(2), eps=-1.0), "eps must be a non-negative"),
        (lambda: adv.group_advantage(np.ones(2), "median"), "kind must be one of"),
        (lambda: adv.expected_dead_share(1.2, 4), r"p must be in \[0, 1\]"),
        (lambda: adv.advantage_whitening(np.ones(3), np.ones(2)), "mask must be of the terms' shape"),
        (lambda: adv.hybrid_advantage(np.ones(3), np.ones((2, 3))), "the group advantages must be of shape"),
    ],
)
def test_errors_say_what_is_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
