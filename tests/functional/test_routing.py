"""Routers: which experts, with what weight; relations, worked figures, errata and bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import routing
from minillm.functional.softmax import softmax

seeds = st.integers(0, 2**32 - 1)


def scores(seed: int, shape=(6, 5)):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.equation("router-logits")
def test_router_logits_are_one_affine_map_per_token():
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4)), rng.normal(size=5)
    r = routing.router_logits(Tensor(x), Tensor(w), Tensor(b)).data
    assert r.shape == (2, 3, 5)
    np.testing.assert_allclose(r[1, 2], w @ x[1, 2] + b)


@pytest.mark.equation("router-mlp")
def test_a_router_with_a_hidden_layer_decides_what_one_map_cannot():
    # exclusive or: expert 0 for (+,+) and (-,-). No linear map ranks the experts so; a hidden layer does.
    x = np.array([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
    w_hidden = 4 * np.array([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])
    w_out = np.array([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    r = routing.router_mlp(Tensor(x), Tensor(w_hidden), Tensor(w_out))
    np.testing.assert_array_equal(routing.gating_softmax(r).data.argmax(-1), [0, 0, 1, 1])


@pytest.mark.equation("gating-softmax")
@given(seeds)
@settings(max_examples=25)
def test_gate_probabilities_sum_to_one_and_keep_the_order(seed):
    r = scores(seed)
    p = routing.gating_softmax(Tensor(r)).data
    np.testing.assert_allclose(p.sum(-1), 1)
    np.testing.assert_array_equal(p.argsort(-1), r.argsort(-1))


@pytest.mark.equation("gating-sigmoid")
def test_affinities_do_not_compete_and_are_normalised_over_the_chosen():
    r = np.array([[2.0, 0.0, -1.0]])
    s = routing.gating_sigmoid(Tensor(r)).data
    raised = routing.gating_sigmoid(Tensor(r + np.array([[0.0, 9.0, 0.0]]))).data
    assert raised[0, 0] == s[0, 0] and raised[0, 2] == s[0, 2]
    gates = routing.topk_renormalise(Tensor(s), routing.top_k(s, 2)).data
    np.testing.assert_allclose(gates, [[s[0, 0] / (s[0, 0] + s[0, 1]), s[0, 1] / (s[0, 0] + s[0, 1]), 0]])


@pytest.mark.equation("topk-renormalise")
@given(seeds, st.integers(1, 5))
@settings(max_examples=40)
def test_k_weights_of_sum_one_in_proportion_to_the_probabilities(seed, k):
    p = softmax(Tensor(scores(seed))).data
    routed = routing.top_k(p, k)
    gates = routing.topk_renormalise(Tensor(p), routed).data
    assert (routed.sum(-1) == k).all() and ((gates > 0) == routed).all()
    np.testing.assert_allclose(gates.sum(-1), 1)
    assert np.where(routed, p, np.inf).min(-1).min() >= 0
    assert (np.where(routed, p, np.inf).min(-1) >= np.where(routed, -np.inf, p).max(-1)).all()
    for row, chosen, weights in zip(p, routed, gates, strict=True):
        np.testing.assert_allclose(weights[chosen] / weights[chosen][0], row[chosen] / row[chosen][0])


@pytest.mark.equation("topk-renormalise")
def test_erratum_38_the_sum_is_over_the_chosen_and_not_over_the_first_k():
    p = np.array([[0.1, 0.2, 0.3, 0.4]])
    gates = routing.topk_renormalise(Tensor(p), routing.top_k(p, 2)).data
    np.testing.assert_allclose(gates, [[0, 0, 3 / 7, 4 / 7]])
    as_printed = p[0, 2:] / p[0, :2].sum()
    assert as_printed.sum() == pytest.approx(0.7 / 0.3)  # not 1


@pytest.mark.equation("topk-renormalise")
def test_ties_go_to_the_lower_number_and_a_row_without_a_choice_to_zero():
    np.testing.assert_array_equal(routing.top_k(np.ones((1, 4)), 2), [[True, True, False, False]])
    np.testing.assert_array_equal(routing.top_k(np.array([0.0, 1, 1, 1]), 2), [False, True, True, False])
    none = routing.topk_renormalise(Tensor(np.ones((1, 2))), np.zeros((1, 2), bool)).data
    np.testing.assert_array_equal(none, [[0, 0]])


@pytest.mark.equation("keep-topk", "topk-renormalise")
@given(seeds, st.integers(1, 5))
@settings(max_examples=40)
def test_softmax_of_the_kept_is_the_renormalised_softmax_values_and_gradients(seed, k):
    h = Tensor(scores(seed), requires_grad=True)
    cotangent = scores(seed + 1)
    one = routing.keep_topk(h, k)
    other = routing.topk_renormalise(softmax(h), routing.top_k(h, k))
    np.testing.assert_allclose(one.data, other.data, atol=1e-12)
    np.testing.assert_allclose(grad(one, h, cotangent).data, grad(other, h, cotangent).data, atol=1e-12)


@pytest.mark.equation("noisy-topk-gating")
def test_noise_is_scaled_by_softplus_of_its_own_map_and_absent_in_evaluation():
    rng = np.random.default_rng(3)
    x, w_gate, w_noise, noise = (rng.normal(size=s) for s in ((4, 3), (5, 3), (5, 3), (4, 5)))
    h = routing.noisy_logits(*map(Tensor, (x, w_gate, w_noise)), noise).data
    np.testing.assert_allclose(h, x @ w_gate.T + noise * np.log1p(np.exp(x @ w_noise.T)))
    np.testing.assert_allclose(routing.noisy_logits(*map(Tensor, (x, w_gate, w_noise))).data, x @ w_gate.T)
    drawn = rng.normal(size=(4000, 4, 5))
    many = np.stack([routing.noisy_logits(*map(Tensor, (x, w_gate, w_noise)), n).data for n in drawn[:400]])
    error = many.std(0) / np.log1p(np.exp(x @ w_noise.T)) - 1
    assert np.abs(error).max() < 4 / np.sqrt(2 * 400)  # the deviation of a standard deviation


@pytest.mark.equation("switch-top1", "wn-switch-figure")
def test_the_switch_figure_two_tokens_over_four_experts():
    # "More" goes to expert 2 with weight 0.65, "Parameters" to expert 1 with 0.8, each alone.
    p = np.array([[0.1, 0.65, 0.15, 0.1], [0.8, 0.1, 0.05, 0.05]])
    gates = routing.switch_top1(Tensor(p)).data
    np.testing.assert_array_equal(gates, [[0, 0.65, 0, 0], [0.8, 0, 0, 0]])


@pytest.mark.equation("switch-top1")
def test_with_one_expert_only_the_gate_value_teaches_the_router():
    r = Tensor(np.array([[1.0, 0.2, -0.3]]), requires_grad=True)
    value = np.array([[2.0, 2.0, 2.0]])  # what the experts return
    switched = (routing.switch_top1(softmax(r)) * value).sum()
    renormalised = (routing.topk_renormalise(softmax(r), routing.top_k(r, 1)) * value).sum()
    assert np.abs(grad(switched, r).data).max() > 0.1
    np.testing.assert_allclose(grad(renormalised, r).data, 0, atol=1e-15)


@pytest.mark.equation("moe-gshard-top2")
def test_gshard_keeps_the_second_expert_with_twice_its_weight_as_probability():
    p = np.array([[0.6, 0.2, 0.15, 0.05]])  # second gate 0.25, kept with probability 0.5
    always = routing.gshard_top2(Tensor(p)).data
    np.testing.assert_allclose(always, [[0.75, 0.25, 0, 0]])
    uniforms = np.random.default_rng(0).random(4000)
    gates = routing.gshard_top2(Tensor(np.repeat(p, 4000, 0)), uniforms).data
    kept = gates[:, 1] > 0
    assert abs(kept.mean() - 0.5) < 4 * np.sqrt(0.25 / 4000)
    np.testing.assert_allclose(gates[:, 0], 0.75)  # not renormalised after a skip
    np.testing.assert_allclose(gates[kept, 1], 0.25)
    assert routing.gshard_top2(Tensor(np.array([[0.5, 0.5]])), np.array([0.999999])).data[0, 1] == 0.5


@pytest.mark.equation("moe-expert-choice")
@given(seeds, st.integers(1, 6))
@settings(max_examples=25)
def test_expert_choice_is_perfectly_balanced_and_takes_the_most_willing(seed, C):
    p = softmax(Tensor(scores(seed))).data
    routed = routing.expert_choice(p, C)
    assert routed.shape == p.shape and (routed.sum(0) == C).all()
    assert (np.where(routed, p, np.inf).min(0) >= np.where(routed, -np.inf, p).max(0)).all()


@pytest.mark.equation("moe-expert-choice")
def test_expert_choice_is_not_causal():
    p = np.array([[0.9, 0.1], [0.8, 0.2]])
    assert routing.expert_choice(p, 1)[0, 0]
    later = np.vstack([p[:1], [[0.95, 0.05]]])  # only the later token changed
    assert not routing.expert_choice(later, 1)[0, 0]


ONES = Tensor(np.ones((2, 3)))
BAD = [
    (lambda: routing.top_k(np.ones((2, 3)), 4), ValueError, "top_k: k must be an integer in 1..3"),
    (lambda: routing.top_k(np.ones((2, 3)), 0), ValueError, "top_k: k must be"),
    (lambda: routing.top_k(np.ones((2, 3)), 1.5), ValueError, "top_k: k must be"),
    (lambda: routing.top_k(np.float64(1), 1), ValueError, "at least one axis"),
    (lambda: routing.router_logits(ONES, Tensor(np.ones((4, 2)))), ValueError, "the last axis of x"),
    (lambda: routing.router_mlp(ONES, Tensor(np.ones((4, 3))), Tensor(np.ones((2, 3)))), ValueError, "linear"),
    (lambda: routing.topk_renormalise(ONES, np.ones((2, 2), bool)), ValueError, "the choice must be booleans"),
    (lambda: routing.topk_renormalise(ONES, np.ones((2, 3), int)), ValueError, "booleans"),
    (lambda: routing.keep_topk(ONES, 7), ValueError, "k must be"),
    (lambda: routing.noisy_logits(ONES, ONES, ONES, np.ones((3, 3))), ValueError, "the noise must be of shape"),
    (lambda: routing.switch_top1(Tensor(np.ones((2, 0)))), ValueError, "k must be"),
    (lambda: routing.gshard_top2(Tensor(np.ones((2, 1)))), ValueError, "k must be an integer in 1..1"),
    (lambda: routing.gshard_top2(ONES, np.ones(3)), ValueError, "the uniforms must be of shape"),
    (lambda: routing.expert_choice(np.ones((2, 3)), 3), ValueError, "the number of tokens"),
    (lambda: routing.expert_choice(np.ones((2, 3)), 0), ValueError, "the capacity C"),
    (lambda: routing.expert_choice(np.ones(3), 1), ValueError, r"of shape \(N, E\)"),
]


@pytest.mark.equation("topk-renormalise", "keep-topk", "moe-expert-choice")
@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input_gives_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.equation("topk-renormalise", "moe-bias-balancing")
@given(seeds, st.sampled_from([(6, 2, 1), (6, 3, 2), (8, 4, 2), (4, 4, 3), (5, 1, 1)]), st.integers(1, 2))
@settings(max_examples=25)
def test_groups_are_those_with_the_largest_sums_of_their_best(seed, sizes, best):
    E, G, k_groups = sizes
    s = scores(seed, (7, E))
    found = routing.within_groups(s, G, k_groups, best)
    for row, kept in zip(s, found, strict=True):
        sums = [sorted(group)[-best:] for group in np.split(row, G)]
        wanted = set(np.argsort([-sum(group) for group in sums])[:k_groups])
        assert {g for g in range(G) if np.isfinite(np.split(kept, G)[g]).all()} == wanted
        np.testing.assert_array_equal(kept[np.isfinite(kept)], row[np.isfinite(kept)])


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ((4, 1), "within_groups: n_groups must be a divisor of the number of experts, 6, got 4"),
        ((3, 4), r"within_groups: k_groups must be an integer in 1\.\.3"),
        ((3, 0), r"within_groups: k_groups must be an integer in 1\.\.3"),
        ((0, 1), "within_groups: n_groups must be a positive integer"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, words):
    with pytest.raises(ValueError, match=words):
        routing.within_groups(scores(0, (2, 6)), *groups)
    with pytest.raises(ValueError, match=r"k must be at most 2, the experts of 1 of 3 groups, got 3"):
        routing.check_groups("layer", 6, 3, 1, 3)
