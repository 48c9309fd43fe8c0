"""Latent attention as a module: its parts are the functions as written; cached equals uncached; bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, no_grad
from minillm.functional.latent_attention import compress_latents, latent_attention, latent_queries
from minillm.functional.masks import causal_mask
from minillm.functional.norms import rms_norm
from minillm.functional.positions import rotation_angles
from minillm.fused.latent_attention import cached_latent_attention
from minillm.nn.latent_attention import LatentAttention

D, H, D_HEAD, D_C, D_R, D_Q, D_V = 20, 3, 4, 6, 2, 8, 5


def mixer_of(seed: int = 0, dtype=np.float64, **changes) -> LatentAttention:
    options = {"d_q": D_Q, "d_v": D_V, "std": 0.5, "std_out": 0.5, **changes}
    mixer = LatentAttention(D, H, D_HEAD, D_C, D_R, np.random.default_rng(seed), **options)
    for parameter in mixer.parameters():
        parameter.data = parameter.data.astype(dtype)
    return mixer


def stream(B: int, L: int, seed: int = 1, dtype=np.float64) -> Tensor:
    return Tensor(np.random.default_rng(seed).normal(size=(B, L, D)).astype(dtype))


@pytest.mark.equation("mla-deepseek", "mla-decoupled-rope")
@pytest.mark.parametrize("d_q", [None, D_Q])
@pytest.mark.parametrize("latent_norm", [True, False])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_the_module_is_the_functions_as_written(d_q, latent_norm, pairing):
    mixer, x, L = mixer_of(d_q=d_q, latent_norm=latent_norm, pairing=pairing), stream(2, 6), 6
    angles = rotation_angles(np.arange(L), D_R)
    c_q = x if mixer.w_down_q is None else x @ mixer.w_down_q.T
    if mixer.q_norm is not None:
        c_q = rms_norm(c_q, mixer.q_norm.gain, 1e-6)
    per_head = mixer.w_up_q.reshape(H, D_HEAD + D_R, -1)
    w_uq, w_qr = (w.reshape(-1, per_head.shape[2]) for w in (per_head[:, :D_HEAD], per_head[:, D_HEAD:]))
    up = mixer.w_up_kv.reshape(H, D_HEAD + D_V, D_C)
    w_uk, w_uv = (w.reshape(-1, D_C) for w in (up[:, :D_HEAD], up[:, D_HEAD:]))
    gain = [] if mixer.kv_norm is None else [mixer.kv_norm.gain]
    latents = compress_latents(
        x, mixer.w_down_kv[:D_C], mixer.w_down_kv[D_C:], *gain, angles=angles, pairing=pairing, eps=1e-6
    )
    queries = latent_queries(c_q, w_uq, w_qr, H=H, angles=angles, pairing=pairing)
    context = latent_attention(*queries, *latents, w_uk, w_uv, causal_mask(L))
    wanted = context.transpose(1, 2).reshape(2, L, H * D_V) @ mixer.w_out.T
    np.testing.assert_allclose(mixer(x).data, wanted.data, atol=1e-12)


@pytest.mark.equation("mla-absorb", "kv-cache-mla", "kv-cache")
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 1000), st.booleans())
@settings(max_examples=25)
def test_cached_equals_uncached_however_the_text_is_cut(pieces, seed, narrow):
    sizes = {} if narrow else {"d_q": None}
    mixer, L = mixer_of(seed, **sizes), sum(pieces)
    x = stream(2, L, seed)
    with no_grad():
        whole, cache, start, found = mixer(x).data, mixer.new_cache(2, L, np.float64), 0, []
        for n in pieces:
            found.append(mixer(x[:, start : start + n], cache=cache).data)
            start += n
    np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=1e-11)


@pytest.mark.equation("mla-absorb")
def test_one_token_absorbs_and_a_long_text_unpacks():
    wide = LatentAttention(64, 8, 16, 64, 8, np.random.default_rng(0))
    assert not wide.unpacking_is_cheaper(1, 500) and wide.unpacking_is_cheaper(500, 500)
    x = Tensor(np.random.default_rng(1).normal(size=(1, 40, 64)).astype(np.float32))
    with no_grad():
        both = []
        for unpack in (True, False):
            wide.unpacking_is_cheaper = lambda L, S, unpack=unpack: unpack
            both.append(wide(x, cache=wide.new_cache(1, 40)).data)
    np.testing.assert_allclose(both[0], both[1], atol=1e-6)


def test_masks_biases_and_positions_reach_both_forms():
    mixer, x, rng = mixer_of(), stream(2, 6), np.random.default_rng(0)
    keep, bias = rng.random((6, 6)) < 0.7, rng.normal(size=(H, 6, 6))
    np.fill_diagonal(keep, True)
    positions = np.array([0, 1, 5, 6, 7, 30])
    with no_grad():
        whole = mixer(x, keep=keep, bias=bias, positions=positions).data
        cache, found = mixer.new_cache(2, 6, np.float64), []
        for i in range(6):
            row = {"keep": keep[i : i + 1, : i + 1], "bias": bias[:, i : i + 1, : i + 1]}
            found.append(mixer(x[:, i : i + 1], positions=positions[i : i + 1], cache=cache, **row).data)
        plain = mixer(x).data
    np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=1e-11)
    assert np.abs(plain - whole).max() > 0.1


def test_a_query_that_sees_nothing_gets_nothing():
    mixer, x = mixer_of(), stream(1, 2)
    with no_grad():
        cache = mixer.new_cache(1, 2, np.float64)
        mixer(x[:, :1], cache=cache)
        nothing = mixer(x[:, 1:], keep=np.zeros((1, 2), bool), cache=cache)
    np.testing.assert_array_equal(nothing.data, 0.0)


@pytest.mark.equation("kv-cache-mla", "mla-cache-size")
def test_its_cache_is_as_narrow_as_the_formula_says():
    cache = mixer_of().new_cache(3, 10)
    assert cache.nbytes == 4 * 3 * 10 * (D_C + D_R)


def test_parameters_are_counted_by_the_formula():
    """d d_c + 2 d_c H d_head + d d_q + d_q H (d_head + d_R) + d d_R + H d_head d, and d_c + d_q for the norms."""
    mixer = mixer_of(d_v=None)
    heads = H * D_HEAD
    count = D * D_C + 2 * D_C * heads + D * D_Q + D_Q * H * (D_HEAD + D_R) + D * D_R + heads * D + D_C + D_Q
    assert mixer.count_parameters() == count


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 0}, "n_heads must be a positive integer"),
        ({"d_c": 0}, "d_c must be a positive integer"),
        ({"d_R": 3}, "d_R must be even"),
        ({"d_q": 0}, "d_q must be a positive integer"),
        ({"pairing": "third"}, "pairing must be one of 'interleaved', 'half'"),
    ],
)
def test_bad_sizes_are_refused(changes, words):
    sizes = {"d_model": D, "n_heads": H, "d_head": D_HEAD, "d_c": D_C, "d_R": D_R, **changes}
    with pytest.raises(ValueError, match=words):
        LatentAttention(rng=np.random.default_rng(0), **sizes)


def test_bad_inputs_are_refused():
    mixer, x = mixer_of(), stream(2, 3)
    with pytest.raises(ValueError, match="the memory must be None"):
        mixer(x, memory=x)
    with pytest.raises(ValueError, match=r"x must be \(B, L, 20\)"):
        mixer(x[..., :4])
    with pytest.raises(RuntimeError, match="no gradient"):
        mixer(x, cache=mixer.new_cache(2, 3, np.float64))
    q_c, q_r = Tensor(np.zeros((2, H, 1, D_HEAD))), Tensor(np.zeros((2, H, 1, D_R)))
    w, cache = Tensor(np.zeros((H * 9, D_C))), np.zeros((2, 4, D_C + D_R))
    with pytest.raises(ValueError, match="the cache must be of shape"):
        cached_latent_attention(q_c, q_r, cache[..., 1:], w)
    with pytest.raises(ValueError, match="w_up_kv must be of a multiple of H = 3 rows"):
        cached_latent_attention(q_c, q_r, cache, w[:-1])
    with pytest.raises(RuntimeError, match="no gradient"):
        cached_latent_attention(Tensor(q_c.data, requires_grad=True), q_r, cache, w)
