"""Streaming attention equals dense attention; dual chunk attention's positions stay in the range seen in training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.functional.attention import causal_mask, scaled_dot_product_attention
from minillm.functional.dual_chunk import dual_chunk_attention, dual_chunk_distances, dual_chunk_positions
from minillm.functional.positions import rope, rotation_angles
from minillm.functional.streaming_attention import Running, online_softmax_step, streaming_attention

seeds = st.integers(0, 2**32 - 1)


def problem(seed: int, L_q: int, L_k: int, d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    return tuple(Tensor(rng.normal(size=(2, h, L, d))) for h, L in ((4, L_q), (2, L_k), (2, L_k)))  # type: ignore


@pytest.mark.equation("flash-attention")
@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.booleans())
def test_streaming_equals_dense_to_rounding(seed, L_q, L_k, block, causal):
    """With fewer keys than queries some queries see nothing, and get 0."""
    q, k, v = problem(seed, L_q, L_k)
    dense = scaled_dot_product_attention(q, k, v, causal_mask(L_q, L_k) if causal else None).data
    np.testing.assert_allclose(streaming_attention(q, k, v, block, causal).data, dense, rtol=1e-11, atol=1e-13)


@pytest.mark.equation("flash-attention")
def test_streaming_survives_scores_beyond_the_exponential_in_any_order():
    q = Tensor(np.full((1, 1, 1, 1), 1000.0))
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        k, v = (Tensor(np.array(x)[order].reshape(1, 1, 3, 1)) for x in ([-5.0, 2.0, 9.0], [1.0, 2.0, 3.0]))
        np.testing.assert_allclose(streaming_attention(q, k, v, block=1).data, 3.0)


@pytest.mark.equation("flash-attention")
@given(seeds)
def test_a_running_softmax_does_not_depend_on_how_the_keys_are_cut(seed):
    rng = np.random.default_rng(seed)
    scores, v = Tensor(rng.normal(size=(1, 1, 2, 6))), Tensor(rng.normal(size=(1, 1, 6, 3)))
    empty = Running(*(Tensor(np.full((1, 1, 2, n), x)) for n, x in ((1, -np.inf), (1, 0.0), (3, 0.0))))
    once = online_softmax_step(*empty, scores, v)
    half = online_softmax_step(*empty, scores[..., :2], v[:, :, :2])
    twice = online_softmax_step(*half, scores[..., 2:], v[:, :, 2:])
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        once.total.data, np.exp(scores.data - scores.data.max(-1, keepdims=True)).sum(-1, keepdims=True)
    )


@pytest.mark.equation("dca-dual-chunk")
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8))
def test_distances_stay_in_the_trained_range_and_are_exact_nearby(L, s, more):
    c = s + more
    found = dual_chunk_distances(L, s, c)
    i, j = np.arange(L)[:, None], np.arange(L)
    seen = causal_mask(L)
    assert (found[~seen] == -1).all() and found[seen].min() >= 0 and found[seen].max() <= c - 1
    near = seen & (i - j <= min(c - s, s))
    np.testing.assert_array_equal(found[near], np.broadcast_to(i - j, (L, L))[near])


@pytest.mark.equation("dca-dual-chunk")
def test_distances_by_hand():
    """Chunks of 2, trained on 4: the third query counts 3 back at most."""
    wanted = [[0, -1, -1, -1, -1], [1, 0, -1, -1, -1], [2, 1, 0, -1, -1], [3, 2, 1, 0, -1], [3, 2, 2, 1, 0]]
    np.testing.assert_array_equal(dual_chunk_distances(5, 2, 4), wanted)
    assert {k: p.tolist() for k, p in dual_chunk_positions(4, 2, 3).items()} == {
        "key": [0, 1, 0, 1], "same": [0, 1, 0, 1], "previous": [2, 2, 2, 2], "older": [2, 2, 2, 2],
    }  # fmt: skip


@pytest.mark.equation("dca-dual-chunk")
@given(seeds, st.integers(1, 6), st.sampled_from(["interleaved", "half"]))
def test_dual_chunk_is_full_attention_while_the_text_fits_a_chunk(seed, L, pairing):
    q, k, v = problem(seed, L, L)
    angles = rotation_angles(np.arange(L), 4)
    full = scaled_dot_product_attention(rope(q, angles, pairing), rope(k, angles, pairing), v, causal_mask(L))
    found = dual_chunk_attention(q, k, v, chunk=6, context=9, pairing=pairing)
    np.testing.assert_allclose(found.data, full.data, rtol=1e-11, atol=1e-13)


@pytest.mark.equation("dca-dual-chunk")
@given(seeds, st.integers(1, 14), st.integers(1, 4), st.integers(1, 4))
def test_every_score_is_that_of_the_stated_distance(seed, L, s, more):
    q, k, v = problem(seed, L, L)
    distances = dual_chunk_distances(L, s, s + more)
    scores = np.full((2, 4, L, L), -np.inf)
    for i in range(L):
        turned = rope(q[:, :, i : i + 1].expand(2, 4, i + 1, 4), rotation_angles(distances[i, : i + 1], 4)).data
        scores[:, :, i, : i + 1] = (turned * k.data.repeat(2, axis=1)[:, :, : i + 1]).sum(-1) / 2
    p = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = p / p.sum(-1, keepdims=True) @ v.data.repeat(2, axis=1)
    found = dual_chunk_attention(q, k, v, chunk=s, context=s + more)
    np.testing.assert_allclose(found.data, wanted, rtol=1e-10, atol=1e-12)


X = Tensor(np.ones((1, 2, 4, 4)))
BAD = {
    "block": (lambda: streaming_attention(X, X, X, block=0), "streaming_attention: block must be a positive integer"),
    "heads": (lambda: streaming_attention(X, X[:, :, :, :2], X), "the width of k must be that of q, 4"),
    "scores": (
        lambda: online_softmax_step(X[..., :1], X[..., :1], X, X[..., :3], X),
        r"scores must be of shape \(1, 2, 4, 4\), got shape \(1, 2, 4, 3\)",
    ),
    "chunk": (
        lambda: dual_chunk_attention(X, X, X, chunk=4, context=4),
        "dual_chunk_positions: chunk must be below the training length, 4, got 4",
    ),
    "distances": (lambda: dual_chunk_distances(4, 0, 4), "dual_chunk_positions: chunk must be a positive integer"),
    "length": (lambda: dual_chunk_positions(0, 1, 4), "dual_chunk_positions: L must be a positive integer"),
    "lengths": (
        lambda: dual_chunk_attention(X[:, :, :2], X, X, chunk=2, context=4),
        "the number of keys must be that of queries, 2",
    ),
    "odd": (
        lambda: dual_chunk_attention(X[..., :3], X[..., :3], X, chunk=2, context=4),
        "d_head must be a positive even number",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
