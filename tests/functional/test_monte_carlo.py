"""Estimates with standard errors, and samplers against the laws they claim to draw from."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.functional import monte_carlo as mc
from tests.oracles import tiny_policies as law

P, Q = law.softmax(law.LOGITS_P), law.softmax(law.LOGITS_Q)
F = np.array([1.0, -2.0, 0.5, 3.0, 0.0])


@pytest.mark.equation("expectation-mc")
def test_the_standard_error_is_honest_and_falls_with_the_root_of_n():
    rng = np.random.default_rng(0)
    exact = mc.expectation(P, F)
    assert exact == pytest.approx(sum(p * f for p, f in zip(P, F)))
    scores = []
    for _ in range(400):
        estimate = mc.expectation_mc(F[rng.choice(5, p=P, size=100)])
        scores.append((estimate.value - exact) / estimate.standard_error)
    assert abs(np.mean(scores)) < 0.25 and 0.85 < np.std(scores) < 1.15
    few, many = (mc.expectation_mc(F[rng.choice(5, p=P, size=n)]).standard_error for n in (200, 20_000))
    assert few / many == pytest.approx(10, rel=0.2)
    assert mc.expectation_mc(np.array([2.0])) == (2.0, np.inf)


@pytest.mark.equation("variance-second-moment")
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20))
@settings(max_examples=40)
def test_variance_by_moments(values):
    x = np.array(values)
    assert mc.variance_second_moment(x) == pytest.approx(x.var(), abs=1e-10)


@pytest.mark.equation("variance-second-moment")
def test_variance_by_moments_cancels_far_from_zero():
    x = np.array([1e8, 1e8 + 1, 1e8 + 2])
    assert x.var() == pytest.approx(2 / 3) and mc.variance_second_moment(x) != pytest.approx(2 / 3, rel=0.5)


@pytest.mark.equation("importance-sampling")
def test_importance_sampling_is_exact_in_mean_and_its_weights_have_chi_square_variance():
    log_p, log_q = np.log(P), np.log(Q)
    assert Q @ (np.exp(log_p - log_q) * F) == pytest.approx(P @ F)
    rng = np.random.default_rng(1)
    draws = rng.choice(5, p=Q, size=40_000)
    estimate = mc.importance_sampling(F[draws], log_p[draws], log_q[draws])
    assert abs(estimate.value - P @ F) < 4 * estimate.standard_error < 0.3
    weight = mc.importance_sampling(np.ones(40_000), log_p[draws], log_q[draws])
    chi2 = (P**2 / Q).sum() - 1
    assert weight.standard_error**2 * 40_000 == pytest.approx(chi2, rel=0.1)
    with pytest.raises(ValueError, match="log_q must be finite"):
        mc.importance_sampling(F[:1], log_p[:1], np.array([-np.inf]))


@pytest.mark.equation("self-normalised-is")
def test_self_normalising_ignores_constants_and_has_a_bias_that_vanishes():
    log_w = np.log(P / Q)
    rng = np.random.default_rng(2)
    draws = rng.choice(5, p=Q, size=30_000)
    estimate = mc.self_normalised_importance_sampling(F[draws], log_w[draws] + 123.0)
    assert abs(estimate.value - P @ F) < 4 * estimate.standard_error < 0.3
    plain = mc.self_normalised_importance_sampling(F[draws], log_w[draws])
    assert plain.value == pytest.approx(estimate.value, rel=1e-12)
    p, q = law.softmax(0.3 * law.LOGITS_P), law.softmax(0.3 * law.LOGITS_Q)
    biases = []
    for K in (1, 2, 4):  # exact means over all K-tuples of draws
        tuples = np.stack(np.meshgrid(*[np.arange(5)] * K, indexing="ij"), -1).reshape(-1, K)
        values = [mc.self_normalised_importance_sampling(F[t], np.log(p / q)[t]).value for t in tuples]
        biases.append(abs(np.prod(q[tuples], axis=1) @ values - p @ F))
    assert biases[0] == pytest.approx(abs(q @ F - p @ F))  # one sample: the weight cancels
    assert biases[0] > 1.5 * biases[1] > 1.5**2 * biases[2] > 0


SAMPLERS = {
    "inverse CDF": lambda n, rng: mc.sample_inverse_cdf(P, n, rng),
    "Gumbel-max": lambda n, rng: mc.sample_gumbel_max(law.LOGITS_P, n, rng),
    "rejection": lambda n, rng: mc.sample_rejection(P, Q, float((P / Q).max()), n, rng),
    "Metropolis-Hastings": lambda n, rng: mc.sample_metropolis_hastings(
        lambda x: law.LOGITS_P[x], np.tile(Q, (5, 1)), 0, 12 * n, rng
    )[::12],
}


@pytest.mark.equation("sampling-algorithms")
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_from_their_law_by_a_chi_square_test(name):
    n = 2000
    draws = SAMPLERS[name](n, np.random.default_rng(5))
    counts = np.bincount(draws, minlength=5)
    assert len(draws) == n
    assert scipy.stats.chisquare(counts, n * P).pvalue > 1e-3
    assert scipy.stats.chisquare(counts, n * Q).pvalue < 1e-6


@pytest.mark.equation("sampling-algorithms")
def test_impossible_categories_are_never_drawn_and_edges_hold():
    rng = np.random.default_rng(0)
    p = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    assert set(mc.sample_inverse_cdf(p, 2000, rng)) == {1, 3}
    assert set(mc.sample_gumbel_max(np.array([-np.inf, 0.0, 1.0]), 500, rng)) == {1, 2}
    with pytest.raises(ValueError, match="the envelope must be at least"):
        mc.sample_rejection(P, Q, 1.0, 5, rng)
    with pytest.raises(ValueError, match="the start must be possible"):
        mc.sample_metropolis_hastings(lambda x: -np.inf, np.eye(2), 0, 3, rng)
    with pytest.raises(ValueError, match="self_normalised_importance_sampling: the largest log-weight must be finite"):
        mc.self_normalised_importance_sampling(F[:1], np.array([-np.inf]))
    with pytest.raises(ValueError, match=r"f must be of shape \(n,\)"):
        mc.expectation_mc(np.array([]))
