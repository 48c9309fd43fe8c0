"""Entropy and divergences: identities, limits, the figures of errata 3, 4 and 74, and torch and SciPy beside."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import information as info
from minillm.functional.softmax import softmax
from tests.oracles import tiny_policies as law

seeds = st.integers(0, 2**32 - 1)
P, Q = law.softmax(law.LOGITS_P), law.softmax(law.LOGITS_Q)


def draw(seed: int, shape=(3, 6), zeros: bool = True):
    """Two sets of distributions; some entries exactly 0 in p where q is not."""
    rng = np.random.default_rng(seed)
    p, q = rng.gamma(0.5, size=(2, *shape)) + 1e-3
    if zeros:
        p[..., 0] = 0
    return p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)


@pytest.mark.equation("entropy", "cross-entropy", "kl-divergence")
@given(seed=seeds)
@settings(max_examples=40)
def test_definitions_bounds_and_the_split_of_cross_entropy(seed):
    p, q = draw(seed)
    entropy, cross, kl = (
        f.data
        for f in (
            info.entropy(Tensor(p)),
            info.cross_entropy_between(Tensor(p), Tensor(q)),
            info.kl_divergence(Tensor(p), Tensor(q)),
        )
    )
    np.testing.assert_allclose(entropy, scipy.stats.entropy(p, axis=-1), atol=1e-12)
    np.testing.assert_allclose(kl, scipy.special.rel_entr(p, q).sum(-1), atol=1e-12)
    np.testing.assert_allclose(cross, entropy + kl, atol=1e-12)
    assert (kl >= 0).all() and (entropy >= 0).all() and (entropy <= np.log(6) + 1e-12).all()
    assert info.kl_divergence(Tensor(p), Tensor(p)).data == pytest.approx(0, abs=1e-15)


@pytest.mark.equation("entropy", "cross-entropy", "kl-divergence", "chi2-divergence")
def test_certainty_uniformity_one_hot_targets_and_impossible_outcomes():
    one_hot, uniform = np.array([0.0, 1.0, 0.0]), np.full(3, 1 / 3)
    assert info.entropy(Tensor(one_hot)).item() == 0
    assert info.entropy(Tensor(uniform)).item() == pytest.approx(np.log(3))
    q = np.array([0.2, 0.5, 0.3])
    assert info.cross_entropy_between(Tensor(one_hot), Tensor(q)).item() == pytest.approx(-np.log(0.5))
    for divergence in (info.cross_entropy_between, info.kl_divergence, info.chi2_divergence):
        assert divergence(Tensor(q), Tensor(one_hot)).item() == np.inf
        assert np.isfinite(divergence(Tensor(one_hot), Tensor(q)).item())
    p, q = (Tensor(np.array(x), requires_grad=True) for x in ([0.0, 0.4, 0.6], [0.0, 0.5, 0.5]))
    for divergence in (info.cross_entropy_between, info.kl_divergence, info.chi2_divergence):
        value = divergence(p, q)  # impossible under both: no matter
        assert np.isfinite(value.item()) and all(np.isfinite(g.data).all() for g in grad(value, [p, q]))
    gradient = grad(info.entropy(p := Tensor(one_hot, requires_grad=True)), p).data
    assert np.isfinite(gradient).all()


@pytest.mark.equation("kl-divergence", "chi2-divergence", "kl-forward-reverse")
def test_the_two_directions_of_erratum_3():
    assert info.kl_divergence(Tensor(P), Tensor(Q)).item() == pytest.approx(1.5718, abs=5e-5)
    assert info.kl_divergence(Tensor(Q), Tensor(P)).item() == pytest.approx(1.7478, abs=5e-5)
    assert info.chi2_divergence(Tensor(P), Tensor(Q)).item() == pytest.approx(7.5202, abs=5e-5)
    weights = P / Q
    assert info.chi2_divergence(Tensor(P), Tensor(Q)).item() == pytest.approx(Q @ (weights - 1) ** 2)


@pytest.mark.equation("kl-forward-reverse", "ppo-kl-orig")
def test_the_directions_of_erratum_4_differ_and_reverse_is_the_default():
    policy, reference = Tensor(np.array([0.98, 0.01, 0.01])), Tensor(np.array([0.49, 0.5, 0.01]))
    assert info.kl_directional(policy, reference).item() == pytest.approx(0.640, abs=5e-4)
    assert info.kl_directional(policy, reference, "forward").item() == pytest.approx(1.616, abs=5e-4)


@pytest.mark.equation("kl-forward-reverse")
def test_with_the_forward_direction_the_optimum_is_not_the_exponential_tilt():
    """Erratum 4: reward minus beta times the divergence is stationary at the tilt, or at beta ref / (lambda - r)."""
    reference, reward, beta = np.array([0.2, 0.3, 0.5]), np.array([1.0, -1.0, 0.5]), 0.7
    tilt = reference * np.exp(reward / beta)
    multiplier = scipy.optimize.brentq(lambda x: (beta * reference / (x - reward)).sum() - 1, 1.01, 10)
    optimum = {"reverse": tilt / tilt.sum(), "forward": beta * reference / (multiplier - reward)}
    for at, p in optimum.items():
        for direction in info.DIRECTIONS:
            z = Tensor(np.log(p), requires_grad=True)
            divergence = info.kl_directional(softmax(z), Tensor(reference), direction)
            slope = np.abs(grad((softmax(z) * reward).sum() - divergence * beta, z).data).max()
            assert slope < 1e-12 if at == direction else slope > 0.01


@pytest.mark.equation("kl-token-exact", "entropy")
@given(seed=seeds, direction=st.sampled_from(info.DIRECTIONS))
@settings(max_examples=30)
def test_logits_give_the_same_as_probabilities_and_any_shift_is_free(seed, direction):
    rng = np.random.default_rng(seed)
    z, ref = 3 * rng.normal(size=(2, 2, 3, 5))
    p, q = Tensor(law.softmax(z)), Tensor(law.softmax(ref))
    shift = rng.normal(size=(2, 3, 1)) * 100
    exact = info.kl_token_exact(Tensor(z + shift), Tensor(ref), direction).data
    np.testing.assert_allclose(exact, info.kl_directional(p, q, direction).data, atol=1e-11)
    np.testing.assert_allclose(info.entropy_from_logits(Tensor(z + shift)).data, info.entropy(p).data, atol=1e-11)


@pytest.mark.equation("kl-token-exact", "entropy")
def test_logits_of_minus_infinity_count_as_impossible():
    z = np.array([0.3, -np.inf, 1.0])
    smaller = np.array([0.3, 1.0])
    live = Tensor(z, requires_grad=True)
    value = info.entropy_from_logits(live)
    assert value.item() == pytest.approx(info.entropy_from_logits(Tensor(smaller)).item())
    assert grad(value, live).data[1] == 0
    ref = np.array([0.1, 0.2, 0.3])
    live = Tensor(z, requires_grad=True)
    value = info.kl_token_exact(live, Tensor(ref))
    assert value.item() == pytest.approx(law.kl(law.softmax(z)[[0, 2]], law.softmax(ref)[[0, 2]]))
    assert np.isfinite(grad(value, live).data).all()
    assert info.kl_token_exact(Tensor(ref), Tensor(z)).item() == np.inf
    assert info.kl_token_exact(Tensor(z), Tensor(z)).item() == 0


@pytest.mark.equation("entropy-bonus", "entropy")
def test_the_gradient_of_the_entropy_and_the_sampled_form_of_erratum_74():
    z = Tensor(law.LOGITS_P, requires_grad=True)
    entropy = info.entropy_from_logits(z)
    gradient = grad(entropy, z).data
    assert entropy.item() == pytest.approx(1.067, abs=5e-4)
    np.testing.assert_allclose(gradient, -P * (np.log(P) + entropy.item()), atol=1e-15)
    assert np.linalg.norm(gradient) == pytest.approx(0.3975, abs=5e-5)
    z = Tensor(law.LOGITS_P, requires_grad=True)
    sampled = -(softmax(z).log() * P).sum()  # the mean of minus the log-prob over frozen samples of the policy
    assert sampled.item() == pytest.approx(entropy.item())
    assert np.linalg.norm(grad(sampled, z).data) < 1e-15
    others = law.softmax(law.LOGITS_OTHER)
    assert info.cross_entropy_between(Tensor(others), Tensor(P)).item() == pytest.approx(1.868, abs=5e-4)


@pytest.mark.equation("kl-bernoulli-gaussian")
def test_closed_forms_against_torch_and_against_sums():
    torch = pytest.importorskip("torch")
    means, spreads = np.array([[0.3, -1.0], [1.0, 0.5]]), np.array([[0.5, 2.0], [1.5, 0.7]])
    ours = info.kl_gaussian(*(Tensor(x) for x in (means[0], spreads[0], means[1], spreads[1]))).data
    normals = [torch.distributions.Normal(torch.tensor(m), torch.tensor(s)) for m, s in zip(means, spreads)]
    np.testing.assert_allclose(ours, torch.distributions.kl_divergence(*normals).numpy(), rtol=1e-12)
    x = np.linspace(-12, 12, 200_001)
    a, b = scipy.stats.norm(means[0, 0], spreads[0, 0]), scipy.stats.norm(means[1, 0], spreads[1, 0])
    assert ours[0] == pytest.approx(np.trapezoid(a.pdf(x) * (a.logpdf(x) - b.logpdf(x)), x), abs=1e-9)
    p, q = np.array([0.2, 0.0, 1.0, 0.5]), np.array([0.6, 0.3, 0.9, 1.0])
    coins = info.kl_bernoulli(Tensor(p), Tensor(q)).data
    assert coins[:3] == pytest.approx([0.2 * np.log(1 / 3) + 0.8 * np.log(2), -np.log(0.7), -np.log(0.9)], abs=1e-12)
    assert coins[3] == np.inf


@pytest.mark.equation("softmax-temperature-limit")
@given(seed=seeds)
@settings(max_examples=30)
def test_entropy_rises_with_temperature_between_argmax_and_uniform(seed):
    z = Tensor(np.random.default_rng(seed).normal(size=(2, 5)))
    temperatures = [0.0, 1e-2, 0.1, 0.5, 1.0, 3.0, 100.0, np.inf]
    entropies = np.array([info.entropy(info.tempered_softmax(z, t)).data for t in temperatures])
    assert (np.diff(entropies, axis=0) >= -1e-12).all() and (entropies[-1] > entropies[2]).all()
    assert (entropies[0] == 0).all() and entropies[-1] == pytest.approx(np.log(5))


@pytest.mark.equation("softmax-temperature-limit")
def test_tied_maxima_share_the_mass_in_the_cold_limit_and_constant_logits_never_change():
    z = Tensor(np.array([2.0, 1.0, 2.0]))
    np.testing.assert_allclose(info.tempered_softmax(z, 0).data, [0.5, 0, 0.5])
    np.testing.assert_allclose(info.tempered_softmax(z, 1e-3).data, [0.5, 0, 0.5])
    np.testing.assert_allclose(info.tempered_softmax(z, np.inf).data, 1 / 3)
    flat = Tensor(np.ones(4))
    assert all((info.tempered_softmax(flat, t).data == 0.25).all() for t in (0, 0.5, 2.0, np.inf))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info.entropy(Tensor(np.array([0.5, 0.6]))), "sum 1"),
        (lambda: info.entropy(Tensor(np.array([1.5, -0.5]))), "non-negative"),
        (lambda: info.kl_divergence(Tensor(P), Tensor(np.array([np.nan, 1.0]))), "q must be non-negative"),
        (lambda: info.kl_divergence(Tensor(P), Tensor(np.array([1.0]))), "of the shape"),
        (lambda: info.kl_directional(Tensor(P), Tensor(Q), "sideways"), "direction must be one of"),
        (lambda: info.kl_token_exact(Tensor(P), Tensor(Q[:3])), "ref_logits must be of shape"),
        (lambda: info.kl_gaussian(*(Tensor(np.array(x)) for x in (0.0, 0.0, 0.0, 1.0))), "positive"),
        (lambda: info.tempered_softmax(Tensor(P), -1.0), "temperature must be at least 0"),
    ],
)
def test_errors_say_what_is_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
