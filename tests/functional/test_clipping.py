"""Ratios and the clip: the lecture's figures, three ways to write one function, where the gradient ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import clipping as clip

ratios = st.floats(0.0, 6.0)
advantages = st.floats(-3, 3, allow_subnormal=False)
seeds = st.integers(0, 2**32 - 1)


def slope(term, ratio: float, advantage: float, **options) -> float:
    live = Tensor(np.array([ratio]), requires_grad=True)
    return grad(term(live, np.array([advantage]), **options).sum(), live).item()


def value(term, ratio: float, advantage: float, **options) -> float:
    return term(np.array([ratio]), np.array([advantage]), **options).item()


@pytest.mark.equation("wn-ratio-clip", "importance-ratio", "ppo-clip", "ppo-clip-cases")
def test_the_lectures_ratio_of_three():
    """Erratum 73: the clipped value 1.2 A is the term for A > 0 only; a bad action counts in full."""
    ratio = clip.importance_ratio(np.log([0.3]), np.log([0.1])).item()
    assert ratio == pytest.approx(3)
    for term in (clip.clip_term, clip.clip_term_g, clip.clip_term_cases):
        assert value(term, ratio, 1.0) == pytest.approx(1.2)
        assert value(term, ratio, -1.0) == pytest.approx(-3)
        assert value(term, 0.1, 1.0) == pytest.approx(0.1)
        assert value(term, 0.1, -1.0) == pytest.approx(-0.8)


@pytest.mark.equation("ppo-clip", "ppo-clip-g", "ppo-clip-cases")
def test_three_ways_to_write_it_agree_on_a_grid():
    ratio, a = (x.ravel() for x in np.meshgrid(np.linspace(0, 3, 121), np.linspace(-2, 2, 41)))
    first, second, third = (t(ratio, a).data for t in (clip.clip_term, clip.clip_term_g, clip.clip_term_cases))
    np.testing.assert_allclose(first, second, atol=1e-15)
    np.testing.assert_allclose(first, third, atol=1e-15)


@pytest.mark.equation("ppo-gradient-region", "grpo-clip-higher", "ppo-clip")
@given(ratio=ratios, a=advantages, high=st.sampled_from([None, 0.28]))
@settings(max_examples=80)
def test_the_gradient_is_the_advantage_or_exactly_zero(ratio, a, high):
    upper = 1.2 if high is None else 1.28
    if min(abs(ratio - 0.8), abs(ratio - upper)) < 1e-9:
        return
    gradient = slope(clip.clip_term, ratio, a, clip_high=high)
    vanishes = bool(clip.zero_gradient_region(np.array([ratio]), np.array([a]), 0.2, high)[0])
    assert vanishes == (a == 0 or (a > 0 and ratio > upper) or (a < 0 and ratio < 0.8))
    assert gradient == (0 if vanishes else pytest.approx(a))


@pytest.mark.equation("ppo-clip", "surrogate-objective")
@given(ratio=ratios, a=advantages, c=st.floats(0.01, 100))
@settings(max_examples=60)
def test_pessimism_and_scaling(ratio, a, c):
    term = value(clip.clip_term, ratio, a)
    assert term <= ratio * a + 1e-12
    assert value(clip.clip_term, ratio, c * a) == pytest.approx(c * term, rel=1e-9, abs=1e-12)
    if 0.8 <= ratio <= 1.2:
        assert term == pytest.approx(ratio * a)


@pytest.mark.equation("grpo-clip-higher")
def test_clip_higher_gives_unlikely_good_actions_more_room():
    assert value(clip.clip_term, 1.25, 1.0) == pytest.approx(1.2)
    assert value(clip.clip_term, 1.25, 1.0, clip_high=0.28) == pytest.approx(1.25)
    assert slope(clip.clip_term, 1.25, 1.0) == 0 and slope(clip.clip_term, 1.25, 1.0, clip_high=0.28) == 1
    assert value(clip.clip_term, 0.5, -1.0, clip_high=0.28) == pytest.approx(-0.8)


@pytest.mark.equation("ppo-dual-clip")
@given(ratio=ratios, a=advantages)
@settings(max_examples=60)
def test_dual_clip_bounds_what_a_bad_action_can_cost(ratio, a):
    dual, plain = value(clip.dual_clip_term, ratio, a), value(clip.clip_term, ratio, a)
    if a >= 0 or ratio <= 3:
        assert dual == pytest.approx(plain)
    else:
        assert dual == pytest.approx(3 * a) and slope(clip.dual_clip_term, ratio, a) == 0
    assert value(clip.dual_clip_term, ratio, a, dual_clip=np.inf) == pytest.approx(plain)


@pytest.mark.equation("ppo-dual-clip")
def test_dual_clip_figure():
    assert value(clip.dual_clip_term, 5.0, -1.0) == -3 and value(clip.clip_term, 5.0, -1.0) == -5


@pytest.mark.equation("grpo-ratio-token", "grpo-ratio-sequence", "gspo", "importance-ratio")
@given(seed=seeds)
@settings(max_examples=30)
def test_the_three_levels_of_a_ratio(seed):
    rng = np.random.default_rng(seed)
    new, old, mask = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), rng.random((3, 5)) < 0.6
    mask[0] = False
    new[~mask] = np.nan
    token, whole, mean = (clip.ratios_at_level(new, old, mask, level).data for level in clip.LEVELS)
    assert (token[~mask] == 1).all() and whole.shape == mean.shape == (3, 1)
    np.testing.assert_allclose(whole[:, 0], token.prod(-1), rtol=1e-12)
    np.testing.assert_allclose(mean[:, 0] ** np.maximum(mask.sum(-1), 1), whole[:, 0], rtol=1e-12)
    assert whole[0] == mean[0] == 1
    np.testing.assert_allclose(clip.importance_ratio(new[mask], new[mask]).data, 1)


@pytest.mark.equation("grpo-ratio-sequence", "gspo")
def test_the_variance_of_a_sequence_ratio_grows_with_length_and_normalising_tames_it():
    """Erratum 81: why the token is the default."""
    rng = np.random.default_rng(0)
    spread = {}
    for T in (1, 16):
        gaps = 0.2 * rng.normal(size=(4000, T))
        mask = np.ones((4000, T))
        spread[T] = [r(gaps, 0 * gaps, mask).data.std() for r in (clip.sequence_ratio, clip.sequence_mean_ratio)]
    assert spread[16][0] > 3 * spread[1][0] and spread[16][1] < spread[1][1] / 3


@pytest.mark.equation("importance-ratio", "stop-gradient")
def test_old_log_probs_and_advantages_receive_no_gradient():
    new = Tensor(np.array([0.3, -0.2]), requires_grad=True)
    ratio = clip.importance_ratio(new, new)  # the same tensor twice: the second is frozen
    np.testing.assert_array_equal(grad(ratio.sum(), new).data, [1, 1])
    a = Tensor(np.array([1.0, 2.0]), requires_grad=True)
    for term in (clip.clip_term, clip.clip_term_g, clip.clip_term_cases, clip.dual_clip_term):
        assert not term(np.ones(2), a).requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip.importance_ratio(np.ones(2), np.ones(3)), "old_logprobs must be of shape"),
        (lambda: clip.clip_term(np.ones(2), np.ones(2), 1.5), "clip widths must be low in"),
        (lambda: clip.clip_term(np.ones(2), np.ones(2), 0.2, -0.1), "clip widths must be low in"),
        (lambda: clip.dual_clip_term(np.ones(2), np.ones(2), dual_clip=1.1), "above the upper clip bound"),
        (lambda: clip.ratios_at_level(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 2)), "word"), "level must be"),
        (lambda: clip.sequence_ratio(np.ones((1, 2)), np.ones((1, 3)), np.ones((1, 2))), "old_logprobs must be"),
    ],
)
def test_errors_say_what_is_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
