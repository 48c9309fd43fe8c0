"""Attention and positions: contracts, relations, errata and a second opinion from torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import attention as written
from minillm.functional.positions import rope, rotation_angles
from minillm.fused.attention import rotary_attention as derived_attention
from minillm.fused.attention import scaled_dot_product_attention as derived_sdpa
from minillm.fused.positions import rope as derived_rope

seeds = st.integers(0, 2**32 - 1)
ROPES = pytest.mark.parametrize("rotate", [rope, derived_rope], ids=["written", "derived"])
ATTENTIONS = pytest.mark.parametrize(
    "attend", [written.rotary_attention, derived_attention], ids=["written", "derived"]
)


def angles_for(L: int, d_head: int, start: int = 0) -> np.ndarray:
    return rotation_angles(np.arange(start, start + L), d_head)


@ROPES
@pytest.mark.equation("pos-rope")
@given(seeds, st.sampled_from(["interleaved", "half"]), st.integers(0, 50), st.integers(0, 50))
def test_inner_products_depend_on_the_distance_only(rotate, seed, pairing, m, shift):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(1, 8)), rng.normal(size=(1, 8))

    def score(p_q, p_k):
        turned_q = rotate(Tensor(q), angles=angles_for(1, 8, p_q), pairing=pairing).data
        return float((turned_q * rotate(Tensor(k), angles=angles_for(1, 8, p_k), pairing=pairing).data).sum())

    assert score(m, 7) == pytest.approx(score(m + shift, 7 + shift), abs=1e-9)


@ROPES
@pytest.mark.equation("pos-rope")
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_rotation_keeps_norms_and_is_undone_by_its_inverse(rotate, pairing):
    x, angles = np.random.default_rng(0).normal(size=(2, 3, 9, 6)), angles_for(9, 6)
    y = rotate(Tensor(x), angles=angles, pairing=pairing)
    np.testing.assert_allclose(np.linalg.norm(y.data, axis=-1), np.linalg.norm(x, axis=-1))
    np.testing.assert_allclose(rotate(y, angles=-angles, pairing=pairing).data, x, atol=1e-14)
    np.testing.assert_array_equal(y.data[..., 0, :], x[..., 0, :])  # position 0 does not turn


@pytest.mark.equation("pos-rope")
def test_the_pairings_differ_by_a_permutation_and_match_the_formula():
    x, angles = np.random.default_rng(1).normal(size=(5, 8)), angles_for(5, 8)
    order = np.arange(8).reshape(2, 4).T.reshape(-1)  # half-split coordinates in interleaved order
    interleaved = rope(Tensor(x[:, order]), angles=angles, pairing="interleaved").data
    np.testing.assert_allclose(interleaved, rope(Tensor(x), angles=angles, pairing="half").data[:, order], atol=1e-15)
    theta = 10_000.0 ** (-2 * 1 / 8)  # pair i = 1 at position 3
    c, s = np.cos(3 * theta), np.sin(3 * theta)
    y = rope(Tensor(x), angles=angles, pairing="interleaved").data
    np.testing.assert_allclose(y[3, 2:4], [c * x[3, 2] - s * x[3, 3], s * x[3, 2] + c * x[3, 3]])


def qkv_of(seed: int, B: int, L: int, H: int, H_kv: int, d: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, L, (H + 2 * H_kv) * d))


@pytest.mark.equation("scaled-dot-product", "attention-weights", "attention-context")
@given(seeds, st.booleans())
def test_torch_agrees_on_scaled_dot_product_attention(seed, causal):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(2, 3, 5, 4)) for _ in range(3))
    keep = written.causal_mask(5) if causal else None
    ours = written.scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), keep).data
    theirs = torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), is_causal=causal)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.equation("attention-weights")
def test_weights_sum_to_one_masked_are_zero_and_an_empty_row_is_zero():
    keep = np.array([[True, False, True], [False, False, False]])
    scores = Tensor(np.array([[1000.0, 2000.0, 999.0], [1.0, 2.0, 3.0]]), requires_grad=True)
    weights = written.attention_weights(scores, keep)
    np.testing.assert_allclose(weights.data.sum(-1), [1, 0])
    assert weights.data[0, 1] == 0 and not weights.data[1].any()
    assert np.isfinite(grad(weights, scores, np.ones((2, 3))).data).all()


@pytest.mark.equation("attention-context")
@given(seeds)
def test_context_is_a_convex_combination_and_linear_in_the_values(seed):
    rng = np.random.default_rng(seed)
    q, k, v, u = (Tensor(rng.normal(size=(1, 2, 4, 3))) for _ in range(4))
    out = written.scaled_dot_product_attention(q, k, v).data
    assert (out <= v.data.max(2, keepdims=True) + 1e-12).all() and (out >= v.data.min(2, keepdims=True) - 1e-12).all()
    both = written.scaled_dot_product_attention(q, k, v * 2.0 + u).data
    np.testing.assert_allclose(both, 2 * out + written.scaled_dot_product_attention(q, k, u).data, atol=1e-12)


@pytest.mark.equation("score-variance")
@pytest.mark.parametrize("d_head", [16, 64, 256])
def test_score_variance_is_linear_in_the_width_of_a_head(d_head):
    """Erratum 20: not quadratic, and of the head, not of the model."""
    rng = np.random.default_rng(d_head)
    q, k = rng.normal(size=(1, 1, 300, d_head)), rng.normal(size=(1, 1, 300, d_head))
    scores = written.scaled_scores(Tensor(q), Tensor(k)).data
    assert scores.var() == pytest.approx(1.0, abs=0.05)
    assert (q[0, 0] @ k[0, 0].T).var() / d_head == pytest.approx(1.0, abs=0.05)


@ATTENTIONS
@pytest.mark.equation("mask-causal", "mha")
@given(seeds, st.sampled_from([1, 5, 64, 97, 130]))
def test_the_past_does_not_see_the_future(attend, seed, L):
    qkv, cut = qkv_of(seed, 1, L, 2, 2, 4), L // 2
    changed = qkv.copy()
    changed[:, cut:] = 7.0
    heads = {"angles": angles_for(L, 4), "H": 2, "H_kv": 2}
    one, two = attend(Tensor(qkv), **heads).data, attend(Tensor(changed), **heads).data
    np.testing.assert_allclose(one[:, :cut], two[:, :cut], rtol=1e-12, atol=1e-14)
    x = Tensor(qkv, requires_grad=True)
    early = np.zeros((1, L, 8))
    early[:, :cut] = 1.0
    assert not grad(attend(x, **heads), x, early).data[:, cut:].any()


@ATTENTIONS
@pytest.mark.equation("gqa", "mqa")
@pytest.mark.parametrize("H_kv", [1, 2, 4])
def test_grouped_attention_is_multi_head_attention_with_repeated_keys_and_values(attend, H_kv):
    B, L, H, d = 2, 70, 4, 6
    qkv = qkv_of(0, B, L, H, H_kv, d)
    q, k, v = np.split(qkv.reshape(B, L, -1, d), [H, H + H_kv], axis=2)
    wide = np.concatenate([q, k.repeat(H // H_kv, axis=2), v.repeat(H // H_kv, axis=2)], axis=2).reshape(B, L, -1)
    angles = angles_for(L, d)
    grouped = Tensor(qkv, requires_grad=True)
    full = Tensor(wide, requires_grad=True)
    a, b = attend(grouped, angles=angles, H=H, H_kv=H_kv), attend(full, angles=angles, H=H, H_kv=H)
    np.testing.assert_allclose(a.data, b.data, rtol=1e-11, atol=1e-13)
    cotangent = np.random.default_rng(1).normal(size=a.shape)
    d_full = grad(b, full, cotangent).data.reshape(B, L, -1, d)
    shared = [d_full[:, :, s].reshape(B, L, H_kv, H // H_kv, d).sum(3) for s in (np.s_[H : 2 * H], np.s_[2 * H :])]
    expected = np.concatenate([d_full[:, :, :H], *shared], axis=2).reshape(B, L, -1)
    np.testing.assert_allclose(grad(a, grouped, cotangent).data, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.equation("mha", "qkv-projection")
@given(seeds, st.sampled_from([(1, 3), (2, 64), (3, 100), (1, 129)]), st.sampled_from(["interleaved", "half"]))
def test_derived_attention_equals_the_written_one_across_blocks(seed, size, pairing):
    B, L = size
    x = Tensor(qkv_of(seed, B, L, 4, 2, 4), requires_grad=True)
    heads = {"angles": angles_for(L, 4), "H": 4, "H_kv": 2, "pairing": pairing}
    a, b = written.rotary_attention(x, **heads), derived_attention(x, **heads)
    np.testing.assert_allclose(a.data, b.data, rtol=1e-11, atol=1e-13)
    cotangent = np.random.default_rng(seed).normal(size=a.shape)
    np.testing.assert_allclose(grad(a, x, cotangent).data, grad(b, x, cotangent).data, rtol=1e-9, atol=1e-11)


@pytest.mark.equation("mha")
def test_large_scores_do_not_overflow():
    x = Tensor((1e3 * qkv_of(0, 1, 80, 2, 2, 4)).astype(np.float32), requires_grad=True)
    y = derived_attention(x, angles=angles_for(80, 4), H=2, H_kv=2)
    assert np.isfinite(y.data).all() and np.isfinite(grad(y.sum(), x).data).all()


def test_bad_input_is_refused():
    q = Tensor(np.ones((1, 3, 2, 4)))
    with pytest.raises(ValueError, match="H_kv must be a divisor of H = 3, got 2"):
        written.scaled_dot_product_attention(q, Tensor(np.ones((1, 2, 2, 4))), Tensor(np.ones((1, 2, 2, 4))))
    for attend in (written.scaled_dot_product_attention, derived_sdpa):
        with pytest.raises(ValueError, match="H_kv must be a divisor of H = 3, got 0"):
            attend(q, Tensor(np.ones((1, 0, 2, 4))), Tensor(np.ones((1, 0, 2, 4))))
    with pytest.raises(ValueError, match=r"repeat_heads: x must be of shape \(B, H_kv, L, d_head\)"):
        written.repeat_heads(Tensor(np.ones((3, 2, 4))), 2)
    with pytest.raises(ValueError, match="the width of k must be that of q"):
        written.scaled_dot_product_attention(q, Tensor(np.ones((1, 3, 2, 5))), Tensor(np.ones((1, 3, 2, 5))))
    with pytest.raises(ValueError, match="the mask must be broadcastable"):
        written.attention_weights(Tensor(np.ones((2, 3))), np.ones((4, 3), bool))
    for attend in (written.rotary_attention, derived_attention):
        with pytest.raises(ValueError, match=r"qkv must be of shape \(B, L, \(H \+ 2 H_kv\) d_head\)"):
            attend(Tensor(np.ones((1, 2, 7))), angles=angles_for(2, 4), H=1, H_kv=1)
        with pytest.raises(ValueError, match="the angles"):
            attend(Tensor(np.ones((1, 2, 12))), angles=angles_for(3, 4), H=1, H_kv=1)
    with pytest.raises(ValueError, match="d_head must be a positive even number"):
        rotation_angles(np.arange(3), 5)
    for rotate in (rope, derived_rope):
        with pytest.raises(ValueError, match="pairing must be one of 'interleaved', 'half'"):
            rotate(Tensor(np.ones((2, 4))), angles=angles_for(2, 4), pairing="both")
