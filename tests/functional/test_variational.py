"""Conjugates, the Fenchel-Young inequality, and the optimum of a regularised reward."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.functional.softmax import softmax
from minillm.functional.variational import (
    convex_conjugate,
    donsker_varadhan,
    fenchel_young_slack,
    regularised_reward_objective,
)
from tests.oracles import tiny_policies as law

REFERENCE, REWARD, BETA = np.array([0.2, 0.3, 0.5]), np.array([1.0, -1.0, 0.5]), 0.7

PAIRS = {  # function, conjugate, slope, grid
    "entropic": (
        lambda u: BETA * (u * np.log(u) - u + 1),
        lambda t: BETA * (np.exp(t / BETA) - 1),
        lambda u: BETA * np.log(u),
        np.linspace(1e-6, 12, 400_001),
    ),
    "quadratic": (lambda u: u**2 / 2, lambda t: t**2 / 2, lambda u: u, np.linspace(-9, 9, 200_001)),
}


@pytest.mark.equation("jensen-convexity-tools")
@pytest.mark.parametrize("name", PAIRS)
def test_the_search_agrees_with_the_closed_form_and_the_slack_vanishes_on_the_slope(name):
    omega, conjugate, slope, grid = PAIRS[name]
    t = np.array([-1.0, 0.0, 0.3, 1.2])
    np.testing.assert_allclose(convex_conjugate(omega, t, grid), conjugate(t), atol=1e-8)
    u = np.array([0.2, 0.9, 1.0, 3.0])
    np.testing.assert_allclose(fenchel_young_slack(omega, conjugate, u, slope(u)), 0, atol=1e-14)
    for shift in (-0.3, 0.3):
        assert (fenchel_young_slack(omega, conjugate, u, slope(u) + shift) > 1e-3).all()


@pytest.mark.equation("donsker-varadhan", "wn-donsker-varadhan")
def test_the_variational_value_is_reached_by_the_tilt_and_by_nothing_else():
    value = donsker_varadhan(Tensor(REWARD), Tensor(REFERENCE), BETA).item()
    assert value == pytest.approx(0.45946766, abs=5e-9)
    tilt = REFERENCE * np.exp(REWARD / BETA)
    tilt = tilt / tilt.sum()
    at_tilt = regularised_reward_objective(Tensor(tilt), Tensor(REWARD), Tensor(REFERENCE), BETA).item()
    assert at_tilt == pytest.approx(value, abs=1e-14)
    rng = np.random.default_rng(0)
    for _ in range(50):
        other = law.softmax(rng.normal(size=3))
        lower = regularised_reward_objective(Tensor(other), Tensor(REWARD), Tensor(REFERENCE), BETA).item()
        assert value - lower == pytest.approx(BETA * law.kl(other, tilt), abs=1e-12)  # the gap is a divergence


@pytest.mark.equation("donsker-varadhan", "wn-fenchel-gap")
def test_the_gap_of_the_surrogate_on_the_same_data():
    """With the entropic link the gap at a policy is beta times the divergence of the tilt from it."""
    omega, conjugate, _, _ = PAIRS["entropic"]
    u_star = np.exp(REWARD / BETA) / (REFERENCE @ np.exp(REWARD / BETA))
    policy = np.array([0.4, 0.4, 0.2])
    t = BETA * np.log(policy / REFERENCE)
    gap = REFERENCE @ fenchel_young_slack(omega, conjugate, u_star, t)
    assert gap == pytest.approx(0.32330663, abs=5e-9)
    assert gap == pytest.approx(BETA * law.kl(REFERENCE * u_star, policy))


@pytest.mark.equation("donsker-varadhan")
def test_its_gradient_by_the_reward_is_the_optimal_policy():
    reward = Tensor(REWARD, requires_grad=True)
    gradient = grad(donsker_varadhan(reward, Tensor(REFERENCE), BETA), reward).data
    np.testing.assert_allclose(gradient, softmax(Tensor(np.log(REFERENCE) + REWARD / BETA)).data, atol=1e-15)


def test_errors_say_what_is_wanted():
    with pytest.raises(ValueError, match="beta must be a positive"):
        donsker_varadhan(Tensor(REWARD), Tensor(REFERENCE), 0.0)
    with pytest.raises(ValueError, match="the reference must be non-negative with sum 1"):
        donsker_varadhan(Tensor(REWARD), Tensor(2 * REFERENCE), 1.0)
    with pytest.raises(ValueError, match="beta must be a positive"):
        regularised_reward_objective(Tensor(REFERENCE), Tensor(REWARD), Tensor(REFERENCE), -1.0)
