"""Dispatch, experts, combine, capacity: no token is lost, every form agrees, worked numbers, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import capacity as cap
from minillm.functional import dispatch as dis
from minillm.functional import experts, routing
from minillm.functional.softmax import softmax
from minillm.fused.experts import mixture_of_experts as fused_experts

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 12), st.integers(1, 6)).flatmap(
    lambda NE: st.tuples(st.just(NE[0]), st.just(NE[1]), st.integers(1, NE[1]))
)


def draw(seed: int, N: int, E: int, k: int, d: int = 4, d_ff: int = 3):
    rng = np.random.default_rng(seed)
    p = softmax(Tensor(rng.normal(size=(N, E)))).data
    routed = routing.top_k(p, k)
    gates = routing.topk_renormalise(Tensor(p), routed).data
    return rng.normal(size=(N, d)), gates, routed, rng.normal(size=(E, 2 * d_ff, d)), rng.normal(size=(E, d, d_ff))


@pytest.mark.equation("moe-dispatch")
@given(seeds, sizes)
@settings(max_examples=40)
def test_packing_is_a_bijection_between_assignments_and_places(seed, NEk):
    N, E, k = NEk
    x, gates, routed, _, _ = draw(seed, N, E, k)
    packing = dis.pack(routed)
    assert packing.loads.sum() == k * N and len(packing.tokens) == k * N
    packed, g = dis.dispatch(Tensor(x), Tensor(gates), packing)
    for e in range(E):
        pi = packing.tokens[packing.rows(e)]
        assert (np.diff(pi) > 0).all()  # in token order, each once
        np.testing.assert_array_equal(packing.eta[pi, e], np.arange(len(pi)))
        np.testing.assert_array_equal(packed.data[packing.rows(e)], x[pi])
        np.testing.assert_array_equal(g.data[packing.rows(e)], gates[pi, e])
    np.testing.assert_array_equal(packing.eta >= 0, routed)


@pytest.mark.equation("moe-combine", "moe-dispatch")
@given(seeds, sizes)
@settings(max_examples=40)
def test_no_token_is_lost_experts_that_do_nothing_give_back_every_token(seed, NEk):
    x, gates, routed, _, _ = draw(seed, *NEk)
    packing = dis.pack(routed)
    packed, g = dis.dispatch(Tensor(x), Tensor(gates), packing)
    np.testing.assert_allclose(dis.combine(packed, g, packing).data, x, atol=1e-12)  # gates sum to 1
    ones = Tensor(np.ones(len(packing.tokens)))
    np.testing.assert_array_equal(dis.combine(packed, ones, packing).data.round(9), (NEk[2] * x).round(9))


@pytest.mark.equation("moe-output", "moe-combine", "moe-expert")
@given(seeds, sizes)
@settings(max_examples=25)
def test_packed_padded_and_fused_equal_the_sum_over_all_experts(seed, NEk):
    args = draw(seed, *NEk)
    tensors = [Tensor(a, requires_grad=True) if a.dtype != bool else a for a in args]
    wanted = [t for t in tensors if isinstance(t, Tensor)]
    cotangent = np.random.default_rng(seed).normal(size=args[0].shape)
    dense = experts.moe_output(*tensors)
    found = [g.data for g in grad(dense, wanted, cotangent)]
    C = int(args[2].sum(0).max()) + 1
    for form in (experts.mixture_of_experts, fused_experts, lambda *a: experts.padded_experts(*a, C=C)):
        y = form(*tensors)
        np.testing.assert_allclose(y.data, dense.data, atol=1e-10)
        for name, ours, theirs in zip(("x", "gates", "w_in", "w_down"), grad(y, wanted, cotangent), found, strict=True):
            np.testing.assert_allclose(ours.data, theirs, atol=1e-9, err_msg=name)


@pytest.mark.equation("moe-output")
def test_experts_that_nobody_visits_are_not_run():
    x, gates, routed, w_in, w_down = draw(0, 5, 4, 1)
    idle = ~routed.any(0)
    assert idle.any()
    w_in[idle], w_down[idle] = np.nan, np.nan
    for form in (experts.mixture_of_experts, fused_experts):
        assert np.isfinite(form(*map(Tensor, (x, gates)), routed, *map(Tensor, (w_in, w_down))).data).all()


@pytest.mark.equation("moe-output")
def test_erratum_37_without_the_index_every_expert_gets_the_whole_vector():
    x, gates, routed, w_in, w_down = draw(0, 3, 2, 1)
    ours = experts.moe_output(*map(Tensor, (x, gates)), routed, *map(Tensor, (w_in, w_down))).data
    each = np.stack([experts.expert(Tensor(x), Tensor(w_in[e]), Tensor(w_down[e])).data for e in range(2)])
    np.testing.assert_allclose(ours, np.einsum("ne,end->nd", gates, each))
    as_printed = (gates[:, :, None] * each.sum(0)[:, None, :]).sum(1)  # G(x), a vector, times every expert
    assert np.abs(as_printed - ours).max() > 0.1


@pytest.mark.equation("moe-expert")
@pytest.mark.parametrize("activation", experts.ACTIVATIONS)
def test_an_expert_is_a_feed_forward_network_of_its_kind(activation):
    rng = np.random.default_rng(1)
    x, f = rng.normal(size=(3, 4)), 6 if activation in experts.GATED else 3
    w_in, w_down = rng.normal(size=(f, 4)), rng.normal(size=(4, 3))
    y = experts.expert(Tensor(x), Tensor(w_in), Tensor(w_down), activation).data
    act = experts.ACTIVATIONS[activation]
    np.testing.assert_allclose(y, act(Tensor(x @ w_in.T)).data @ w_down.T)
    layer = fused_experts(
        Tensor(x), Tensor(np.ones((3, 1))), np.ones((3, 1), bool), *(Tensor(w[None]) for w in (w_in, w_down)),
        activation=activation,
    )  # fmt: skip
    np.testing.assert_allclose(layer.data, y, atol=1e-12)


@pytest.mark.equation("moe-shared-experts")
def test_shared_experts_see_every_token_with_weight_one():
    x, gates, routed, w_in, w_down = draw(2, 6, 4, 2)
    shared = draw(3, 6, 2, 1)[3:]
    y = experts.with_shared_experts(*map(Tensor, (x, gates)), routed, *map(Tensor, (w_in, w_down, *shared))).data
    alone = experts.mixture_of_experts(*map(Tensor, (x, gates)), routed, *map(Tensor, (w_in, w_down))).data
    for w, v in zip(*shared, strict=True):
        alone = alone + experts.expert(Tensor(x), Tensor(w), Tensor(v)).data
    np.testing.assert_allclose(y, alone, atol=1e-12)


# ------------------------------------------------------------------------------------------------ capacity


@pytest.mark.equation("moe-capacity", "wn-capacity")
def test_erratum_39_the_printed_capacity_forces_drops_and_can_be_zero():
    printed = cap.capacity(1.0, 512, 8, 2, as_printed=True)
    assert printed * 8 == 512 and cap.capacity(1.0, 512, 8, 2) * 8 == 1024
    balanced = np.zeros((512, 8), bool)
    for n in range(512):
        balanced[n, [n % 8, (n + 1) % 8]] = True
    assert cap.drop_rate(balanced, cap.drop_overflow(balanced, printed)) == 0.5  # and this is the best case
    assert cap.drop_rate(balanced, cap.drop_overflow(balanced, cap.capacity(1.0, 512, 8, 2))) == 0.0
    with pytest.raises(ValueError, match="fewer tokens than experts"):
        cap.capacity(1.0, 3, 8, 2, as_printed=True)
    assert cap.capacity(1.0, 3, 8, 2) == 1


@pytest.mark.equation("moe-capacity")
@given(st.floats(0.1, 3), st.integers(1, 100), sizes)
@settings(max_examples=40)
def test_capacity_times_experts_holds_the_assignments(c, N, NEk):
    _, E, k = NEk
    C = cap.capacity(c, N, E, k)
    assert C >= 1 and c * k * N - 1e-6 <= C * E and c * k * N > (C - 1) * E


@pytest.mark.equation("moe-drop")
@given(seeds, sizes, st.integers(1, 6))
@settings(max_examples=40)
def test_the_first_tokens_are_served_and_the_gates_stay(seed, NEk, C):
    x, gates, routed, w_in, w_down = draw(seed, *NEk)
    served = cap.drop_overflow(routed, C)
    assert (served <= routed).all()
    np.testing.assert_array_equal(served.sum(0), np.minimum(routed.sum(0), C))
    for e in range(routed.shape[1]):
        np.testing.assert_array_equal(np.flatnonzero(served[:, e]), np.flatnonzero(routed[:, e])[:C])
    rate = cap.drop_rate(routed, served)
    assert 0 <= rate < 1 and round(rate * routed.sum()) == routed.sum() - served.sum()
    y = fused_experts(*map(Tensor, (x, gates)), served, *map(Tensor, (w_in, w_down))).data
    np.testing.assert_array_equal(y[~served.any(1)], 0)  # the residual alone passes
    kept_all = (served == routed).all(1)
    whole = fused_experts(*map(Tensor, (x, gates)), routed, *map(Tensor, (w_in, w_down))).data
    np.testing.assert_allclose(y[kept_all], whole[kept_all], atol=1e-12)


@pytest.mark.equation("moe-reroute")
@given(seeds, sizes, st.integers(1, 6))
@settings(max_examples=60)
def test_rerouting_serves_at_least_what_dropping_does_and_no_expert_twice(seed, NEk, C):
    N, E, k = NEk
    rng = np.random.default_rng(seed)
    p = softmax(Tensor(rng.normal(size=(N, E)) + 2 * rng.normal(size=E))).data
    routed = routing.top_k(p, k)
    served = cap.reroute_overflow(p, routed, C)
    assert (served >= cap.drop_overflow(routed, C)).all()
    assert (served.sum(0) <= C).all() and (served.sum(1) <= k).all()
    lost = served.sum(1) < k
    if lost.any():  # only where every expert that a token has not tried is full
        assert (served.sum(0)[~(routed | served)[lost].all(0)] == C).all()
    if k == 1 and E * C >= N:
        assert not lost.any()
    gates = cap.rerouted_gates(Tensor(p), routed, served).data
    np.testing.assert_allclose(gates.sum(1)[~lost], 1)
    assert (gates.sum(1) <= 1 + 1e-12).all() and not gates[~served].any()


@pytest.mark.equation("moe-reroute")
def test_with_two_experts_a_token_something_can_still_be_lost():
    # three tokens want experts 1 and 2, which hold two each; the third is left with expert 3 alone
    p = np.tile([[0.5, 0.4, 0.1]], (3, 1))
    served = cap.reroute_overflow(p, routing.top_k(p, 2), 2)
    np.testing.assert_array_equal(served, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    gates = cap.rerouted_gates(Tensor(p), routing.top_k(p, 2), served).data
    np.testing.assert_allclose(gates[2], [0, 0, 0.1 / 0.9])  # the divisor it had


@pytest.mark.equation("moe-pad")
@given(seeds, sizes, st.integers(0, 3))
@settings(max_examples=25)
def test_padding_is_undone_and_what_it_holds_has_no_effect(seed, NEk, more):
    x, gates, routed, _, _ = draw(seed, *NEk)
    packing = dis.pack(routed)
    packed, _ = dis.dispatch(Tensor(x), Tensor(gates), packing)
    C = int(packing.loads.max()) + more
    buffers = dis.pad_to_capacity(packed, packing, C)
    assert buffers.shape == (packing.n_experts, C, x.shape[1])
    padded = np.arange(C) >= packing.loads[:, None]
    assert not buffers.data[padded].any()
    dirty = buffers.data.copy()
    dirty[padded] = np.nan
    np.testing.assert_array_equal(dis.unpad(Tensor(dirty), packing).data, packed.data)


def _layer(**change):
    x, gates, routed, w_in, w_down = draw(0, 4, 3, 2)
    given = {"x": x, "gates": gates, "routed": routed, "w_in": w_in, "w_down": w_down} | change
    return [v if v.dtype.kind == "b" else Tensor(v) for v in given.values()]


LAYER_BAD = [
    ({"x": np.ones((2, 2, 4))}, "Flatten batch and sequence"),
    ({"gates": np.ones((4, 2))}, "the gates must be of shape"),
    ({"routed": np.ones((3, 3), bool)}, "the choice must be booleans"),
    ({"w_in": np.ones((3, 6, 5))}, "w_in must be of shape"),
    ({"w_in": np.ones((3, 5, 4))}, "must be even"),
    ({"w_down": np.ones((3, 4, 2))}, "w_down must be of shape"),
    ({"w_down": np.ones((2, 4, 3))}, "w_down must be of shape"),
]


@pytest.mark.equation("moe-output")
@pytest.mark.parametrize(("change", "words"), LAYER_BAD)
@pytest.mark.parametrize(
    "form", [experts.moe_output, experts.mixture_of_experts, fused_experts], ids=["dense", "packed", "derived"]
)
def test_a_layer_refuses_what_does_not_fit(form, change, words):
    with pytest.raises(ValueError, match=words):
        form(*_layer(**change))


EYE = np.eye(3, dtype=bool)
PACKING = dis.pack(EYE)
BAD = [
    (lambda: experts.expert(Tensor(np.ones((2, 4))), *map(Tensor, (np.ones((6, 4)), np.ones((4, 3)))), "tanh"), "one of"),
    (lambda: experts.run_experts(Tensor(np.ones((3, 4))), PACKING, *map(Tensor, (np.ones((3, 6, 4)), np.ones((3, 4, 4))))), "w_down"),
    (lambda: experts.with_shared_experts(*_layer(), Tensor(np.ones((1, 6, 5))), Tensor(np.ones((1, 4, 3)))), "w_in"),
    (lambda: experts.padded_experts(*_layer(), C=1), "Drop or reroute the overflow"),
    (lambda: dis.pack(np.ones((2, 3))), "booleans of shape"),
    (lambda: dis.dispatch(Tensor(np.ones((2, 4))), Tensor(np.ones((3, 3))), PACKING), "dispatch: x must be"),
    (lambda: dis.dispatch(Tensor(np.ones((3, 4))), Tensor(np.ones((3, 2))), PACKING), "dispatch: the gates"),
    (lambda: dis.combine(Tensor(np.ones((2, 4))), Tensor(np.ones(3)), PACKING), "combine: y must be"),
    (lambda: dis.combine(Tensor(np.ones((3, 4))), Tensor(np.ones(2)), PACKING), "combine: the weights"),
    (lambda: dis.pad_to_capacity(Tensor(np.ones((3, 4))), PACKING, 0), "the capacity C must be at least"),
    (lambda: dis.pad_to_capacity(Tensor(np.ones((2, 4))), PACKING, 1), "pad_to_capacity: x"),
    (lambda: dis.unpad(Tensor(np.ones((2, 4, 1))), PACKING), "the buffers must be"),
    (lambda: cap.capacity(0, 4, 2, 1), "the capacity factor must be a positive number"),
    (lambda: cap.capacity(float("inf"), 4, 2, 1), "finite"),
    (lambda: cap.capacity(1, 4, 2, 3), "k must be at most E = 2"),
    (lambda: cap.capacity(1, 0, 2, 1), "the number of tokens must be a positive integer"),
    (lambda: cap.drop_overflow(EYE, 0), "the capacity C must be a positive integer"),
    (lambda: cap.drop_overflow(np.eye(3), 1), "booleans"),
    (lambda: cap.reroute_overflow(np.eye(3), EYE, 0), "the capacity C must be a positive integer"),
    (lambda: cap.reroute_overflow(np.ones((3, 2)), EYE, 1), "the choice must be booleans of shape"),
    (lambda: cap.rerouted_gates(Tensor(np.eye(3)), EYE, EYE[:2]), "the choice must be booleans"),
    (lambda: cap.drop_rate(EYE, EYE[:2]), "the choice must be booleans"),
]  # fmt: skip


@pytest.mark.equation("moe-capacity", "moe-pad", "moe-drop", "moe-reroute")
@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_gives_one_clear_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()
