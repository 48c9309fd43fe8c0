"""The estimators of a divergence: what each is worth as a value and as a loss, by exact expectation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import kl_estimators as est
from minillm.functional.softmax import log_softmax
from tests.oracles import tiny_policies as law

P, Q, OLD = (law.softmax(z) for z in (law.LOGITS_P, law.LOGITS_Q, law.LOGITS_OTHER))
LOG_P, LOG_Q, LOG_OLD = np.log(P), np.log(Q), np.log(OLD)
FORWARD = P - Q  # the gradient of D(q || p) by the logits of p
REVERSE = P * (np.log(P / Q) - law.kl(P, Q))  # that of D(p || q)


def mean_and_gradient(estimator, sampled_from):
    """The mean of an estimator under a frozen law, and the mean of its gradient by the logits of p."""
    z = Tensor(law.LOGITS_P, requires_grad=True)
    mean = (estimator(log_softmax(z)) * sampled_from).sum()
    return mean.item(), grad(mean, z).data


@pytest.mark.equation("kl-estimator-k1", "kl-estimator-k2", "kl-estimator-k3")
def test_values_and_gradients_of_errata_5_and_6():
    k1, k2, k3 = (
        mean_and_gradient(lambda lp, kind=kind: est.kl_estimate(lp, LOG_Q, kind), P) for kind in ("k1", "k2", "k3")
    )
    assert k1[0] == pytest.approx(1.5718, abs=5e-5) and k3[0] == pytest.approx(1.5718, abs=5e-5)
    assert k1[0] == pytest.approx(k3[0], abs=1e-14) and abs(k2[0] - k1[0]) > 0.3
    assert np.linalg.norm(REVERSE) == pytest.approx(0.688, abs=5e-4)
    np.testing.assert_allclose(k1[1], 0, atol=1e-15)
    np.testing.assert_allclose(k2[1], REVERSE, atol=1e-15)
    np.testing.assert_allclose(k3[1], FORWARD, atol=1e-15)


@pytest.mark.equation("kl-estimator-k3-inverted", "chi2-divergence")
def test_the_inverted_form_estimates_something_else():
    """Erratum 6: 5.9484, which is chi-square minus the divergence; under the reference it is the other direction."""
    under_p, _ = mean_and_gradient(lambda lp: est.kl_estimator_k3_inverted(lp, LOG_Q), P)
    under_q, _ = mean_and_gradient(lambda lp: est.kl_estimator_k3_inverted(lp, LOG_Q), Q)
    assert under_p == pytest.approx(5.9484, abs=5e-5)
    assert under_p == pytest.approx((P**2 / Q).sum() - 1 - law.kl(P, Q))
    assert under_q == pytest.approx(1.7478, abs=5e-5)


@pytest.mark.equation("kl-estimator-k3-inverted", "chi2-divergence")
def test_the_inverted_form_pulls_along_something_else():
    """On own samples along half the gradient of chi-square, on the reference's along that of the forward divergence."""
    _, under_p = mean_and_gradient(lambda lp: est.kl_estimator_k3_inverted(lp, LOG_Q), P)
    _, under_q = mean_and_gradient(lambda lp: est.kl_estimator_k3_inverted(lp, LOG_Q), Q)
    logits = Tensor(np.log(P), requires_grad=True)
    chi2 = (log_softmax(logits).exp() ** 2 * (1 / Q)).sum() - 1.0
    (slope,) = grad([chi2], [logits])
    np.testing.assert_allclose(under_p, slope.data / 2, atol=1e-13)
    np.testing.assert_allclose(under_q, FORWARD, atol=1e-14)
    assert np.abs(under_p - REVERSE).max() > 0.1


@pytest.mark.equation("kl-estimator-is")
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_on_old_samples_the_ratio_makes_value_and_gradient_right(kind):
    with_ratio = mean_and_gradient(lambda lp: est.kl_estimator_is(lp, LOG_Q, LOG_OLD, kind), OLD)
    assert with_ratio[0] == pytest.approx(law.kl(P, Q), abs=1e-14)
    np.testing.assert_allclose(with_ratio[1], REVERSE, atol=1e-14)
    without = mean_and_gradient(lambda lp: est.kl_estimate(lp, LOG_Q, kind), OLD)
    assert abs(without[0] - law.kl(P, Q)) > 0.1
    assert np.abs(without[1] - REVERSE).max() > 0.1


@pytest.mark.equation("kl-estimator-is")
@pytest.mark.parametrize(("kind", "gradient"), [("k1", 0 * P), ("k2", REVERSE), ("k3", FORWARD)])
def test_on_old_samples_a_frozen_ratio_keeps_each_estimators_own_gradient(kind, gradient):
    found = mean_and_gradient(lambda lp: est.kl_estimator_is(lp, LOG_Q, LOG_OLD, kind, stop_ratio=True), OLD)
    np.testing.assert_allclose(found[1], gradient, atol=1e-14)


@pytest.mark.equation("kl-estimator-k1", "kl-estimator-k2", "kl-estimator-k3")
@given(
    st.lists(st.floats(-80, 80, allow_subnormal=False), min_size=1, max_size=6),
    st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=60)
def test_shapes_of_the_three_curves(gaps, dtype):
    d = np.array(gaps, dtype)  # log ref - log p
    log_p = Tensor(np.zeros_like(d))
    k1, k2, k3 = (est.kl_estimate(log_p, d, kind).data for kind in ("k1", "k2", "k3"))
    assert k3.dtype == dtype and np.isfinite(k3).all()
    np.testing.assert_array_equal(k1, -d)
    assert (k2 >= 0).all() and (k3 >= 0).all()
    np.testing.assert_allclose(
        k3, np.expm1(d.astype(np.float64)) - d, rtol=3e-6, atol=1e-12 + np.finfo(dtype).eps * np.abs(d).max()
    )


@pytest.mark.equation("kl-estimator-k3")
def test_equal_policies_cost_nothing_and_pull_nowhere():
    for kind in est.ESTIMATORS:
        live = Tensor(LOG_P, requires_grad=True)
        value = est.kl_estimate(live, LOG_P, kind)
        assert (value.data == 0).all()
        if kind != "k1":
            assert (grad(value.sum(), live).data == 0).all()


@pytest.mark.equation("kl-estimator-k1", "kl-estimator-k3")
def test_k3_is_the_steadier_one_near_and_the_wilder_one_far():
    rng = np.random.default_rng(0)

    def spread(sigma, kind):
        z = rng.normal(size=50)
        p, q = law.softmax(z), law.softmax(z + sigma * rng.normal(size=50))
        k = est.kl_estimate(Tensor(np.log(p)), np.log(q), kind).data
        return np.sqrt(p @ k**2 - (p @ k) ** 2)

    near, far = ([np.mean([spread(s, k) for _ in range(50)]) for k in ("k1", "k3")] for s in (0.2, 3.0))
    assert near[1] < near[0] / 4 and far[1] > 1.2 * far[0]


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="kind must be one of 'k1', 'k2', 'k3'"):
        est.kl_estimate(LOG_P, LOG_Q, "k4")


@pytest.mark.parametrize("name", ["kl_estimator_k1", "kl_estimator_k2", "kl_estimator_k3"])
def test_log_probs_of_two_shapes_are_refused_and_not_stretched(name):
    """A forgotten axis would give a matrix of pairs, and a mean of it that looks like any other."""
    with pytest.raises(ValueError, match=rf"{name}: the two log-probs must be of one shape, got .*\(5,\)"):
        getattr(est, name)(LOG_P, LOG_Q[:, None])
