"""Balancing losses, the bias without a loss, load figures and budgets: worked numbers, errata, bad input."""

from fractions import Fraction
from math import comb, log

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import balance, load_figures, routing
from minillm.functional.load_figures import Arrangement
from minillm.functional.softmax import softmax

seeds = st.integers(0, 2**32 - 1)


def even(N: int, E: int, k: int) -> np.ndarray:
    """A choice of k experts a token that gives every expert the same load."""
    routed = np.zeros((N, E), bool)
    for n in range(N):
        routed[n, (n * k + np.arange(k)) % E] = True
    return routed


@pytest.mark.equation("moe-aux-loss", "wn-aux-uniform")
@pytest.mark.parametrize(("E", "k"), [(8, 1), (8, 2), (64, 6)])
def test_even_routing_gives_one_or_k_as_the_source_divides(E, k):
    routed, p = even(3 * E, E, k), Tensor(np.full((3 * E, E), 1 / E))
    assert float(balance.aux_loss(p, routed)) == pytest.approx(1)
    assert float(balance.aux_loss(p, routed, normalise_by_k=False)) == pytest.approx(k)
    assert balance.load_fractions(routed).sum() == pytest.approx(1)
    assert balance.load_fractions(routed, normalise_by_k=False).sum() == pytest.approx(k)


@pytest.mark.equation("moe-aux-loss", "wn-aux-uniform")
def test_erratum_40_even_routing_is_not_the_minimum():
    p = np.array([[0.51, 0.49]] * 60 + [[0.01, 0.99]] * 40)
    value = float(balance.aux_loss(Tensor(p), routing.top_k(p, 1)))
    assert value == pytest.approx(0.924, abs=1e-9)
    uniform = np.full((6, 3), 1 / 3)  # with m even, every f gives 1
    for columns in ([0] * 6, [0, 0, 1, 1, 2, 2]):
        assert float(balance.aux_loss(Tensor(uniform), np.eye(3, dtype=bool)[columns])) == pytest.approx(1)


@pytest.mark.equation("moe-aux-loss")
@given(seeds)
@settings(max_examples=40)
def test_when_loads_and_probabilities_are_in_the_same_order_even_is_the_least(seed):
    rng = np.random.default_rng(seed)
    p = softmax(Tensor(rng.normal(size=(20, 4)) + rng.normal(size=4))).data
    routed = routing.top_k(p, 2)
    f, m = balance.load_fractions(routed), p.mean(0)
    if (f.argsort(kind="stable") == m.argsort(kind="stable")).all():
        assert float(balance.aux_loss(Tensor(p), routed)) >= 1 - 1e-12  # Chebyshev's inequality


@pytest.mark.equation("moe-aux-loss")
def test_the_gradient_goes_through_m_only_and_lowers_the_crowded_expert():
    r = Tensor(np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]), requires_grad=True)
    p = softmax(r)
    routed = routing.top_k(p, 1)
    found = grad(balance.aux_loss(p, routed), p).data
    np.testing.assert_allclose(found, np.tile(3 * balance.load_fractions(routed) / 3, (3, 1)))
    p = softmax(r)
    step = -grad(balance.aux_loss(p, routed), r).data
    assert (step[:, 0] < 0).all() and (step[:, 2] > 0).all()


@pytest.mark.equation("moe-total-loss")
def test_total_loss_adds_a_share():
    assert float(balance.moe_total_loss(Tensor(2.0), Tensor(1.5), 0.1)) == pytest.approx(2.15)
    assert float(balance.moe_total_loss(Tensor(2.0), Tensor(1.5), 0)) == 2.0


@pytest.mark.equation("moe-importance-loss")
def test_importance_is_the_squared_coefficient_of_variation():
    gates = np.random.default_rng(0).uniform(size=(7, 5))
    total = gates.sum(0)
    for ddof in (0, 1):
        wanted = 0.1 * (total.std(ddof=ddof) / total.mean()) ** 2
        assert float(balance.importance_loss(Tensor(gates), 0.1, ddof=ddof)) == pytest.approx(wanted)
    assert float(balance.importance_loss(Tensor(np.ones((3, 4))))) == pytest.approx(0, abs=1e-15)
    collapsed = np.eye(4)[[0, 0, 0]]
    assert float(balance.importance_loss(Tensor(collapsed), 1.0)) == pytest.approx(3)  # E - 1


@pytest.mark.equation("moe-importance-loss")
def test_the_smooth_load_is_the_probability_that_fresh_noise_chooses_the_expert():
    rng = np.random.default_rng(1)
    clean, scale, k = rng.normal(size=(2, 4)), rng.uniform(0.5, 1.5, size=(2, 4)), 2
    noisy = clean + scale * rng.normal(size=(2, 4))
    p = balance.chosen_probability(*map(Tensor, (clean, noisy, scale)), k).data
    n = 4000
    for t in range(2):
        for i in range(4):
            fresh = np.repeat(noisy[t : t + 1], n, 0)
            fresh[:, i] = clean[t, i] + scale[t, i] * rng.normal(size=n)
            share = routing.top_k(fresh, k)[:, i].mean()
            assert abs(share - p[t, i]) < 4 * np.sqrt(0.25 / n)
    threshold = np.sort(np.delete(noisy[0], 0))[-k]
    assert p[0, 0] == pytest.approx(scipy.stats.norm.cdf((clean[0, 0] - threshold) / scale[0, 0]))


@pytest.mark.equation("moe-importance-loss")
def test_the_load_loss_has_a_gradient_that_lowers_the_crowded_expert():
    clean = Tensor(np.tile([1.0, 0.0, -0.2], (6, 1)), requires_grad=True)
    noise = np.random.default_rng(2).normal(size=(6, 3))
    loss = balance.load_loss(clean, clean + noise, Tensor(np.ones((6, 3))), 1)
    assert grad(loss, clean).data[:, 0].sum() > 0


@pytest.mark.equation("moe-z-loss")
def test_the_z_loss_grows_with_the_size_of_the_logits():
    r = np.random.default_rng(0).normal(size=(3, 4))
    wanted = (np.log(np.exp(r).sum(-1)) ** 2).mean()
    assert float(balance.z_loss(Tensor(r))) == pytest.approx(wanted)
    assert float(balance.z_loss(Tensor(r + 10))) > 50 * wanted


@pytest.mark.equation("moe-sequence-balance")
@given(seeds)
@settings(max_examples=25)
def test_the_sequence_loss_is_the_auxiliary_loss_of_every_sequence(seed):
    s = np.random.default_rng(seed).uniform(0.05, 1, size=(3, 6, 4))
    routed = routing.top_k(s, 2)
    each = [float(balance.aux_loss(Tensor(a / a.sum(-1, keepdims=True)), b)) for a, b in zip(s, routed, strict=True)]
    assert float(balance.sequence_balance_loss(Tensor(s), routed, 0.5)) == pytest.approx(0.5 * np.mean(each))
    # balanced in the batch, collapsed in each sequence: only this loss sees it
    one_each = np.repeat(np.eye(2, dtype=bool)[:, None], 4, 1)
    p = np.where(one_each, 0.9, 0.1)
    assert float(balance.aux_loss(Tensor(p), one_each)) == pytest.approx(1)
    assert float(balance.sequence_balance_loss(Tensor(p), one_each, 1.0)) == pytest.approx(1.8)


@pytest.mark.equation("moe-bias-balancing", "gating-sigmoid")
def test_the_bias_evens_out_the_load_and_never_enters_a_weight():
    rng = np.random.default_rng(0)
    s = 1 / (1 + np.exp(-(rng.normal(size=(400, 6)) + np.linspace(-1.5, 1.5, 6))))
    bias = np.zeros(6)
    before = load_figures.load_figures(balance.biased_choice(s, bias, 2).sum(0))
    for _ in range(400):
        bias = balance.updated_bias(bias, balance.biased_choice(s, bias, 2).sum(0), 0.002)
    routed = balance.biased_choice(s, bias, 2)
    after = load_figures.load_figures(routed.sum(0))
    assert before.max_over_mean > 1.8 and after.max_over_mean < 1.1
    gates = routing.topk_renormalise(Tensor(s), routed).data
    np.testing.assert_allclose(gates, np.where(routed, s, 0) / np.where(routed, s, 0).sum(-1, keepdims=True))
    assert (routed != routing.top_k(s, 2)).any()


@pytest.mark.equation("moe-bias-balancing")
def test_the_bias_moves_by_the_sign_alone():
    np.testing.assert_allclose(balance.updated_bias(np.zeros(3), [10, 4, 1], 0.1), [-0.1, 0.1, 0.1])
    np.testing.assert_allclose(balance.updated_bias(np.ones(2), [3, 3], 0.1), [1, 1])


# ------------------------------------------------------------------------------------------------ figures


@pytest.mark.equation("moe-collapse-metrics")
def test_load_figures_at_both_ends():
    assert load_figures.load_figures([5, 5, 5, 5]) == pytest.approx((1, log(4), 0))
    assert load_figures.load_figures([0, 20, 0, 0]) == pytest.approx((4, 0, 3))


@pytest.mark.equation("moe-fine-grained", "wn-moe-combinations")
def test_cutting_experts_multiplies_the_combinations_at_equal_cost():
    coarse = Arrangement(16, 2, 1024)
    fine = load_figures.fine_grained(coarse, 4)
    assert fine == (64, 8, 256, 0)
    assert coarse.combinations == comb(16, 2) == 120 and fine.combinations == 4_426_165_368
    assert load_figures.budget_ratio(fine, coarse) == 1
    for gated in (True, False):
        before, after = (load_figures.moe_parameters(a, 512, gated=gated) for a in (coarse, fine))
        routers = 512 * (64 - 16)  # the router alone grows
        assert after.total - before.total == after.active - before.active == routers


@pytest.mark.equation("moe-fine-grained")
def test_erratum_41_with_k_left_alone_the_active_compute_falls():
    coarse = Arrangement(16, 2, 1024)
    slide = Arrangement(64, 2, 256)
    active = [load_figures.moe_parameters(a, 512).active - 512 * a.E for a in (coarse, slide)]
    assert active[0] == 4 * active[1]


@pytest.mark.equation("moe-shared-experts", "wn-moe-segmentation")
@pytest.mark.parametrize("N", [4, 16])
def test_erratum_42_equal_budget_is_one_routed_expert_fewer(N):
    coarse = Arrangement(N, 2, 64)
    halves = load_figures.fine_grained(coarse, 2)
    shared = load_figures.with_shared(halves, 1)
    assert shared == (2 * N - 1, 3, 32, 1)
    assert load_figures.budget_ratio(shared, coarse) == 1
    slide = Arrangement(2 * N, 4, 32, 1)
    assert load_figures.budget_ratio(slide, coarse) == 1 + Fraction(1, 2 * N)


@pytest.mark.equation("moe-params-active")
def test_total_and_active_parameters():
    count = load_figures.moe_parameters(Arrangement(8, 2, 10, 1), 4)
    assert count == ((8 + 1) * 120 + 32, (2 + 1) * 120 + 32)
    assert load_figures.moe_parameters(Arrangement(8, 2, 10), 4, gated=False, bias=True) == (8 * 80 + 40, 2 * 80 + 40)
    mixtral = load_figures.moe_parameters(Arrangement(8, 2, 14336), 4096)
    assert round(32 * mixtral.total / 1e9, 1) == 45.1 and round(32 * mixtral.active / 1e9, 1) == 11.3


ONES, CHOICE = Tensor(np.ones((2, 3))), np.ones((2, 3), bool)
BAD = [
    (lambda: balance.load_fractions(np.ones((2, 3))), "booleans"),
    (lambda: balance.load_fractions(np.zeros((2, 3), bool)), "at least one expert"),
    (lambda: balance.aux_loss(ONES, CHOICE[:1]), "the choice must be booleans"),
    (lambda: balance.moe_total_loss(Tensor(1.0), Tensor(1.0), -0.1), "the coefficient"),
    (lambda: balance.importance_loss(Tensor(np.ones((2, 1))), ddof=1), "above ddof"),
    (lambda: balance.importance_loss(ONES, -1.0), "the weight"),
    (lambda: balance.chosen_probability(ONES, ONES, ONES, 3), "k must be an integer in 1..2"),
    (lambda: balance.chosen_probability(ONES, ONES, Tensor(np.ones((2, 2))), 1), "the scale must be"),
    (lambda: balance.load_loss(ONES, Tensor(np.ones((1, 3))), ONES, 1), "the noisy logits"),
    (lambda: balance.load_loss(ONES, ONES, ONES, 1, -0.1), "the weight"),
    (lambda: balance.sequence_balance_loss(Tensor(np.ones((1, 2, 3))), CHOICE), "the choice"),
    (lambda: balance.sequence_balance_loss(Tensor(np.ones((1, 2, 3))), np.zeros((1, 2, 3), bool)), "every sequence"),
    (lambda: balance.sequence_balance_loss(Tensor(np.ones((1, 2, 3))), CHOICE[None], -1.0), "the coefficient"),
    (lambda: balance.biased_choice(ONES, np.zeros(2), 1), "the bias must be"),
    (lambda: balance.biased_choice(ONES, np.zeros(3), 4), "k must be"),
    (lambda: balance.updated_bias(np.zeros(3), np.zeros(2)), "the loads must be"),
    (lambda: balance.updated_bias(np.zeros(3), np.zeros(3), -1.0), "the rate"),
    (lambda: load_figures.load_figures([0, 0]), "positive sum"),
    (lambda: load_figures.load_figures([-1, 2]), "none negative"),
    (lambda: load_figures.load_figures([]), "the loads must be"),
    (lambda: load_figures.fine_grained(Arrangement(4, 2, 10), 4), "a divisor of d_ff"),
    (lambda: load_figures.fine_grained(Arrangement(4, 2, 10), 0), "m must be a positive integer"),
    (lambda: load_figures.fine_grained(Arrangement(4, 2, 10, 1), 2), "K_s must be 0"),
    (lambda: load_figures.with_shared(Arrangement(4, 2, 10), 2), "below k = 2"),
    (lambda: load_figures.moe_parameters(Arrangement(2, 3, 10), 4), "k must be at most E = 2"),
    (lambda: load_figures.moe_parameters(Arrangement(2, 1, 10), 0), "d_model"),
    (lambda: load_figures.budget_ratio(Arrangement(2, 1, 0), Arrangement(2, 1, 4)), "d_ff"),
]


@pytest.mark.equation("moe-aux-loss", "moe-collapse-metrics", "moe-fine-grained")
@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_gives_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()
