"""Latent attention: absorbed equals unpacked, the rotary part does what RoPE does, sizes of DeepSeek, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional.attention import scaled_dot_product_attention
from minillm.functional.latent_attention import (
    absorb_output,
    absorbed_latent_attention,
    compress_latents,
    latent_attention,
    latent_cache_width,
    latent_queries,
)
from minillm.functional.linear_algebra import split_heads
from minillm.functional.masks import causal_mask
from minillm.functional.positions import rotation_angles

B, H, L, D, D_HEAD, D_C, D_R, D_V = 2, 3, 5, 12, 4, 6, 2, 5


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [Tensor(rng.normal(size=shape), requires_grad=True) for shape in shapes]


def pieces(seed: int = 0, L_q: int = L, L_k: int = L) -> list[Tensor]:
    q = (B, H, L_q, D_HEAD), (B, H, L_q, D_R)
    return draw(seed, *q, (B, L_k, D_C), (B, L_k, D_R), (H * D_HEAD, D_C), (H * D_V, D_C))


@pytest.mark.equation("mla-absorb", "mla-deepseek", "mla-decoupled-rope")
@given(st.integers(0, 10**6), st.sampled_from([(5, 5), (1, 7), (3, 4)]), st.booleans())
@settings(max_examples=25)
def test_the_absorbed_form_is_the_unpacked_one_in_value_and_gradient(seed, lengths, causal):
    args, keep = pieces(seed, *lengths), causal_mask(*lengths) if causal else None
    one, other = latent_attention(*args, keep), absorbed_latent_attention(*args, keep)
    np.testing.assert_allclose(one.data, other.data, atol=1e-13)
    g = Tensor(np.random.default_rng(seed).normal(size=one.shape))
    for a, b in zip(grad([one], args, [g]), grad([other], args, [g]), strict=True):
        np.testing.assert_allclose(a.data, b.data, atol=1e-11)


@pytest.mark.equation("mla-deepseek")
def test_it_is_attention_with_keys_and_values_of_low_rank():
    q_c, q_r, c, k_r, w_uk, w_uv = pieces()
    found = latent_attention(q_c, q_r, c, k_r, w_uk, w_uv)
    for h in range(H):
        k_c, v = (c.data @ w.data[h * n : (h + 1) * n].T for w, n in ((w_uk, D_HEAD), (w_uv, D_V)))
        scores = q_c.data[:, h] @ k_c.swapaxes(1, 2) + q_r.data[:, h] @ k_r.data.swapaxes(1, 2)
        e = np.exp(scores / np.sqrt(D_HEAD + D_R))
        np.testing.assert_allclose(found.data[:, h], (e / e.sum(-1, keepdims=True)) @ v, atol=1e-12)
    keys = np.concatenate([c.data @ w_uk.data[h * D_HEAD : (h + 1) * D_HEAD].T for h in range(H)], -1)
    assert np.linalg.matrix_rank(keys.reshape(-1, H * D_HEAD)) == D_C < H * D_HEAD


@pytest.mark.equation("mla-absorb")
def test_the_output_map_can_be_absorbed_too():
    context, w_uv, w_o = draw(0, (B, H, L, D_C), (H * D_V, D_C), (D, H * D_V))
    values = context @ w_uv.reshape(H, D_V, D_C).T  # (B, H, L, d_v)
    two_maps = values.transpose(1, 2).reshape(B, L, H * D_V) @ w_o.T
    one_map = (context @ absorb_output(w_uv, w_o, H=H).T).sum(1)
    np.testing.assert_allclose(one_map.data, two_maps.data, atol=1e-12)


@pytest.mark.equation("mla-decoupled-rope")
def test_scores_depend_on_distance_and_the_rotary_key_is_shared():
    """Shifting all positions changes nothing; every head reads the same rotary key."""
    h, w_dkv, w_kr, w_uq, w_qr = draw(1, (B, L, D), (D_C, D), (D_R, D), (H * D_HEAD, D), (H * D_R, D))
    w_uk, w_uv = draw(2, (H * D_HEAD, D_C), (H * D_V, D_C))
    results = []
    for start in (0, 100):
        angles = rotation_angles(np.arange(start, start + L), D_R)
        latents = compress_latents(h, w_dkv, w_kr, angles=angles)
        assert latents.k_r.shape == (B, L, D_R)  # one for all heads
        queries = latent_queries(h, w_uq, w_qr, H=H, angles=angles)
        results.append(latent_attention(*queries, *latents, w_uk, w_uv, causal_mask(L)).data)
    np.testing.assert_allclose(results[0], results[1], atol=1e-12)
    still = rotation_angles(np.zeros(L), D_R)
    unmoved = latent_attention(
        *latent_queries(h, w_uq, w_qr, H=H, angles=still),
        *compress_latents(h, w_dkv, w_kr, angles=still),
        w_uk,
        w_uv,
        causal_mask(L),
    )
    assert np.abs(unmoved.data - results[0]).max() > 1e-3


@pytest.mark.equation("mla-decoupled-rope", "mla-absorb")
def test_a_rotated_key_could_not_be_absorbed():
    """Why the rotary part is kept apart: with the turn between the two maps, the product depends on the distance."""
    w_uq, w_uk = draw(3, (D_HEAD, D), (D_HEAD, D_C))
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=D), rng.normal(size=D_C)

    def turned(vector, position):
        angles = rotation_angles(np.array([position]), D_HEAD)[0]
        pairs = vector.reshape(-1, 2) @ np.array([1, 1j]) * np.exp(1j * angles)
        return np.stack([pairs.real, pairs.imag], -1).ravel()

    absorbed = (w_uk.data.T @ w_uq.data @ x) @ c  # one matrix for all distances
    scores = [turned(w_uq.data @ x, 5) @ turned(w_uk.data @ c, s) for s in (5, 4, 0)]
    assert scores[0] == pytest.approx(absorbed)  # right at distance 0 only
    assert abs(scores[1] - absorbed) > 0.1 and abs(scores[2] - absorbed) > 0.1


@pytest.mark.equation("mla-deepseek")
def test_with_full_rank_it_is_ordinary_attention():
    """With d_c = d and no rotary part that matters, low rank is no restriction: multi-head attention comes out."""
    h, w_uk, w_uv, w_uq = draw(4, (B, L, D), (H * D_HEAD, D), (H * D_V, D), (H * D_HEAD, D))
    nothing_q, nothing_k = Tensor(np.zeros((B, H, L, D_R))), Tensor(np.zeros((B, L, D_R)))
    q = split_heads(h @ w_uq.T, H)
    found = latent_attention(q, nothing_q, h, nothing_k, w_uk, w_uv, causal_mask(L))
    k, v = split_heads(h @ w_uk.T, H), split_heads(h @ w_uv.T, H)
    wanted = scaled_dot_product_attention(q, k, v, causal_mask(L), scale=1 / np.sqrt(D_HEAD + D_R))
    np.testing.assert_allclose(found.data, wanted.data, atol=1e-12)


@pytest.mark.equation("mla-cache-size")
def test_the_cache_of_deepseek_v3():
    latent, full, ratio = latent_cache_width(512, 64, 128, 128)
    assert (latent, full) == (576, 32768) and round(ratio, 1) == 56.9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: latent_attention(a[0], a[1][:, :, :2], *a[2:]), "q_r must be of shape"),
        (lambda a: latent_attention(a[0][0], *a[1:]), r"q_c must be of shape \(B, H, L_q, d_head\)"),
        (lambda a: latent_attention(a[0], a[1], a[2][:1], *a[3:]), r"c must be of shape \(B=2"),
        (lambda a: latent_attention(*a[:3], a[3][:, :2], *a[4:]), "k_r must be of shape .* one key for all heads"),
        (lambda a: absorbed_latent_attention(*a[:4], a[4][:, :2], a[5]), "w_uk must be of shape"),
        (lambda a: absorbed_latent_attention(*a[:4], a[4][:4], a[5]), "w_uk must be of H d_head = 12 rows"),
        (lambda a: absorbed_latent_attention(*a[:5], a[5][:4]), "the rows of w_uv must be a multiple of H = 3"),
        (lambda a: absorb_output(a[5], Tensor(np.zeros((D, 4))), H=H), "w_o must be of shape"),
        (lambda a: absorb_output(a[5][:4], Tensor(np.zeros((D, 4))), H=H), "the rows of w_uv must be a multiple"),
        (lambda a: latent_cache_width(0, 1, 1, 1), "d_c must be a positive integer"),
        (lambda a: latent_cache_width(4, 1, 1, 1.5), "d_head must be a positive integer, got 1.5"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(pieces())


def test_maps_that_do_not_fit_are_refused():
    h, w, w_odd = draw(0, (B, L, D), (D_C, D), (3, D))
    angles = rotation_angles(np.arange(L), D_R)
    with pytest.raises(ValueError, match=r"w_dkv must be of shape \(d_out, 12\)"):
        compress_latents(h, w[:, :3], w_odd, angles=angles)
    with pytest.raises(ValueError, match="even d_head"):
        compress_latents(h, w, w_odd, angles=angles)
    with pytest.raises(ValueError, match=r"w_qr must be of shape \(d_out, 12\)"):
        latent_queries(h, w, w_odd[:, :4], H=H, angles=angles)
    with pytest.raises(ValueError, match="the rows of w_uq must be a multiple of H = 4"):
        latent_queries(h, w, w, H=4, angles=angles)
