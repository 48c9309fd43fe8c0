"""Returns and advantages along time: identities between the forms, ends of episodes, padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.functional import returns as ret

seeds = st.integers(0, 2**32 - 1)
factors = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def draw(seed: int, B: int = 3, longest: int = 7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, B, int(rng.integers(1, longest + 1))))


@pytest.mark.equation("wn-gae-example", "gae-recursion")
def test_the_terminal_score_enters_at_the_last_real_step():
    """Erratum 68: with an advantage of 0 at the last real step the score never counts, whatever it is."""
    values, rewards = np.array([0.2, 0.3, 0.4]), np.array([0.0, 0.0, 1.0])
    np.testing.assert_allclose(ret.gae(rewards, values, gamma=1.0, lam=0.95), [0.7365, 0.67, 0.6])

    def slipped(score):  # the recursion started one step early
        delta = np.append(rewards[:-1], score) + np.append(values[1:], 0) - values
        advantages = np.zeros(3)
        for t in (1, 0):
            advantages[t] = delta[t] + 0.95 * advantages[t + 1]
        return advantages

    np.testing.assert_allclose(slipped(1.0), [0.195, 0.1, 0], atol=1e-15)
    np.testing.assert_array_equal(slipped(1.0), slipped(100.0))
    high = ret.gae(np.array([0, 0, 100.0]), values)
    assert (high > 80).all()


@pytest.mark.equation("wn-gae-defaults")
def test_defaults_are_those_of_language_models():
    rewards, values = draw(0)
    np.testing.assert_array_equal(ret.gae(rewards, values), ret.gae(rewards, values, gamma=1.0, lam=0.95))
    assert np.abs(ret.gae(rewards, values, gamma=0.99) - ret.gae(rewards, values)).max() > 1e-6


@pytest.mark.equation("gae-sum", "gae-recursion", "n-step-advantage", "td-residual", "mc-advantage")
@given(seed=seeds, gamma=factors, lam=factors)
@settings(max_examples=60)
def test_all_forms_of_gae_agree(seed, gamma, lam):
    rewards, values = draw(seed)
    following = np.concatenate([values[:, 1:], np.zeros((3, 1))], axis=1)
    deltas = ret.td_residual(rewards, values, following, gamma=gamma)
    recursion = ret.gae(rewards, values, gamma, lam)
    np.testing.assert_allclose(recursion, ret.gae_sum(deltas, gamma, lam), atol=1e-12)
    np.testing.assert_allclose(recursion, ret.gae_from_n_steps(rewards, values, gamma, lam), atol=1e-12)
    np.testing.assert_allclose(ret.n_step_advantage(rewards, values, 1, gamma), deltas, atol=1e-14)
    whole = ret.n_step_advantage(rewards, values, rewards.shape[1] + 2, gamma)
    np.testing.assert_allclose(whole, ret.mc_advantage(rewards, values, gamma), atol=1e-12)
    if lam == 0:
        np.testing.assert_allclose(recursion, deltas, atol=1e-14)
    if lam == 1:
        np.testing.assert_allclose(recursion, ret.mc_advantage(rewards, values, gamma), atol=1e-12)
    np.testing.assert_allclose(ret.value_target(recursion, values), recursion + values)


@pytest.mark.equation("return-discounted", "return-split")
@given(seed=seeds, gamma=factors)
@settings(max_examples=40)
def test_returns_by_definition_and_their_split_into_past_and_future(seed, gamma):
    rewards, _ = draw(seed)
    T = rewards.shape[1]
    returns = ret.return_discounted(rewards, gamma)
    for t in range(T):
        direct = sum(gamma**k * rewards[:, t + k] for k in range(T - t))
        np.testing.assert_allclose(returns[:, t], direct, atol=1e-12)
        past, future = ret.return_split(rewards, t, gamma)
        np.testing.assert_allclose(past + future, returns[:, 0], atol=1e-12)
        np.testing.assert_allclose(future, gamma**t * returns[:, t], atol=1e-12)  # erratum 64: not the return itself


@pytest.mark.equation("done-flags", "gae-recursion", "return-discounted")
@given(seed=seeds, gamma=factors, lam=factors)
@settings(max_examples=40)
def test_two_episodes_in_one_buffer_do_not_leak_into_each_other(seed, gamma, lam):
    first, second = draw(seed), draw(seed + 1)
    rewards, values = np.concatenate([first, second], axis=-1)
    ends = np.zeros(rewards.shape, bool)
    ends[:, first.shape[-1] - 1] = ends[:, -1] = True
    joined = ret.gae(rewards, values, gamma, lam, terminated=ends)
    apart = [ret.gae(*episode, gamma, lam) for episode in (first, second)]
    np.testing.assert_allclose(joined, np.concatenate(apart, axis=-1), atol=1e-13)
    returns = ret.return_discounted(rewards, gamma, done=ends)
    np.testing.assert_allclose(
        returns, np.concatenate([ret.return_discounted(e[0], gamma) for e in (first, second)], -1), atol=1e-13
    )


@pytest.mark.equation("done-flags", "td-residual", "gae-recursion")
def test_a_truncated_episode_bootstraps_and_a_terminated_one_does_not():
    """Erratum 46: two flags. Both stop the recursion; only a truncation counts what would have followed."""
    rewards, values = np.array([1.0, 1.0, 5.0]), np.array([0.5, 0.6, 9.0])
    cut = np.array([False, True, False])
    following = np.array([0.6, 0.8, 0.0])  # 0.8: the state before the reset
    truncated = ret.gae(rewards, values, 0.9, 0.8, truncated=cut, next_values=following)
    terminated = ret.gae(rewards, values, 0.9, 0.8, terminated=cut, next_values=following)
    assert truncated[1] == pytest.approx(1 + 0.9 * 0.8 - 0.6) and terminated[1] == pytest.approx(1 - 0.6)
    assert truncated[0] == pytest.approx(1 + 0.9 * 0.6 - 0.5 + 0.9 * 0.8 * truncated[1])
    np.testing.assert_array_equal(ret.done_flags(cut, ~cut), True)
    np.testing.assert_array_equal(ret.done_flags([0, 1, 0], [0, 0, 0]), cut)
    with pytest.raises(ValueError, match="next_values must be given where steps are truncated"):
        ret.gae(rewards, values, truncated=cut)


@pytest.mark.equation("gae-recursion")
@given(seed=seeds, gamma=factors, lam=factors)
@settings(max_examples=40)
def test_masked_steps_are_skipped_wherever_they_stand(seed, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values = draw(seed, B=1)
    T = rewards.shape[1]
    wide = np.sort(rng.permutation(T + 4)[:T])
    mask = np.zeros((1, T + 4), bool)
    mask[0, wide] = True
    r, v = np.full((2, 1, T + 4), np.nan)
    r[mask], v[mask] = rewards[0], values[0]
    found = ret.gae(r, v, gamma, lam, mask=mask)
    np.testing.assert_allclose(found[mask], ret.gae(rewards, values, gamma, lam)[0], atol=1e-13)
    assert (found[~mask] == 0).all()


@pytest.mark.equation("td-unbiased", "td-residual")
def test_the_mean_residual_over_next_states_is_the_advantage_when_the_values_are_right():
    """Erratum 67: the average is over the next state, the action being given."""
    rng = np.random.default_rng(0)
    S, A, gamma = 4, 3, 0.8
    P = rng.gamma(1.0, size=(S, A, S))
    P /= P.sum(-1, keepdims=True)
    r, policy = rng.normal(size=(S, A)), rng.gamma(1.0, size=(S, A))
    policy /= policy.sum(-1, keepdims=True)
    v = np.linalg.solve(np.eye(S) - gamma * np.einsum("sa,sat->st", policy, P), (policy * r).sum(-1))
    advantage = r + gamma * P @ v - v[:, None]
    np.testing.assert_allclose((policy * advantage).sum(-1), 0, atol=1e-14)
    s, a, t = (x.ravel() for x in np.indices((S, A, S)))
    deltas = ret.td_residual(r[s, a], v[s], v[t], gamma=gamma).reshape(S, A, S)
    np.testing.assert_allclose((P * deltas).sum(-1), advantage, atol=1e-14)
    wrong = v + rng.normal(size=S)
    off = ret.td_residual(r[s, a], wrong[s], wrong[t], gamma=gamma).reshape(S, A, S)
    assert np.abs((P * off).sum(-1) - advantage).max() > 0.1


def test_integer_rewards_and_one_dimension_are_fine():
    np.testing.assert_allclose(ret.return_discounted(np.array([0, 0, 1]), 0.5), [0.25, 0.5, 1])
    assert ret.gae(np.zeros((2, 0)), np.zeros((2, 0))).shape == (2, 0)
    assert ret.gae(np.ones(3, np.float32), np.ones(3, np.float32)).dtype == np.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ret.return_discounted(np.ones(3), 1.5), r"gamma must be in \[0, 1\]"),
        (lambda: ret.gae(np.ones(3), np.ones(3), lam=-0.1), r"lam must be in \[0, 1\]"),
        (lambda: ret.gae(np.ones(3), np.ones(2)), "values must be of shape"),
        (lambda: ret.gae(np.ones(3), np.ones(3), mask=np.ones(2)), "mask must be of the terms' shape"),
        (lambda: ret.n_step_advantage(np.ones(3), np.ones(3), 0), "n must be a positive integer"),
        (lambda: ret.return_split(np.ones(3), 3), r"t must be in \[0, 3\)"),
        (lambda: ret.td_residual(np.ones(3), np.ones(3), np.ones(4)), "next_values must be of shape"),
        (lambda: ret.value_target(np.ones(3), np.ones(2)), "values must be of shape"),
    ],
)
def test_errors_say_what_is_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
