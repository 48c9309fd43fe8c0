"""Sparse patterns: each against its definition, its limits and dense attention under the same mask."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.functional import sparse_masks as masks
from minillm.functional.attention import causal_mask, scaled_dot_product_attention
from minillm.functional.sparse_attention import block_sparse_attention, topk_attention, topk_keep

seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(1, 20)


def by_definition(L_q: int, L_k: int, rule) -> np.ndarray:
    """A mask pair by pair, with the causal condition."""
    return np.array([[j <= i and bool(rule(i, j)) for j in range(L_k)] for i in range(L_k - L_q, L_k)])


@given(lengths, st.integers(0, 5), st.integers(1, 8), st.integers(1, 5), st.integers(0, 4))
@pytest.mark.equation(
    "sparse-attention-window", "sparse-attention-strided", "sparse-attention-dilated", "attention-sink"
)
def test_patterns_follow_their_definitions(L_q, extra, s, r, n_sink):
    L_k, c = L_q + extra, max(1, s // 2)
    cases = [
        (masks.window_mask(L_q, s, L_k), lambda i, j: i - s < j),
        (masks.strided_mask(L_q, s, L_k), lambda i, j: i - j < s or (i - j) % s == 0),
        (masks.fixed_mask(L_q, s, c, L_k), lambda i, j: i // s == j // s or j % s >= s - c),
        (masks.dilated_mask(L_q, s, r, L_k), lambda i, j: (i - j) % r == 0 and i - j < r * s),
        (masks.sink_mask(L_q, s, n_sink, L_k), lambda i, j: j > i - s or j < n_sink),
    ]
    for found, rule in cases:
        np.testing.assert_array_equal(found, by_definition(L_q, L_k, rule))


@given(lengths, st.integers(1, 6))
@pytest.mark.equation(
    "sparse-attention-window", "sparse-attention-dilated", "sparse-attention-global", "attention-sink"
)
def test_patterns_meet_in_their_limits(L, w):
    window = masks.window_mask(L, w)
    np.testing.assert_array_equal(masks.window_mask(L, L), causal_mask(L))
    np.testing.assert_array_equal(masks.dilated_mask(L, w, 1), window)
    np.testing.assert_array_equal(masks.global_mask(L, w, []), window)
    np.testing.assert_array_equal(masks.sink_mask(L, w, 0), window)
    np.testing.assert_array_equal(masks.strided_mask(L, 1), causal_mask(L))
    np.testing.assert_array_equal(masks.global_mask(L, w, range(L), causal=False), np.ones((L, L), bool))


@pytest.mark.equation("sparse-attention-window", "sparse-attention-strided")
def test_how_many_pairs_are_kept():
    L, w = 256, 16
    assert masks.window_mask(L, w).sum() == L * w - w * (w - 1) // 2  # O(L w)
    growth = [masks.strided_mask(n * n, n).sum() / (n * n) ** 1.5 for n in (8, 16, 32)]
    assert growth[0] < growth[1] < growth[2] < 1.5  # O(L sqrt(L)), towards 3/2 from below


@pytest.mark.equation("sparse-attention-global")
def test_global_tokens_see_all_and_are_seen_by_all():
    keep = masks.global_mask(9, 2, [4], causal=False)
    assert keep[4].all() and keep[:, 4].all() and not keep[0, 2] and (keep == keep.T).all()
    decoder = masks.global_mask(9, 2, [4])
    assert decoder[4, :5].all() and not decoder[4, 5:].any() and decoder[8, 4]


@pytest.mark.equation("sparse-attention-bigbird")
@given(seeds, st.integers(2, 10), st.booleans())
def test_bigbird_is_the_union_of_its_parts(seed, n, causal):
    keep = masks.bigbird_blocks(n, 2, 1, 2, np.random.default_rng(seed), causal)
    allowed = np.tril(np.ones((n, n), bool)) if causal else np.ones((n, n), bool)
    i, j = np.arange(n)[:, None], np.arange(n)
    base = allowed & ((np.abs(i - j) < 2) | (j < 1) | (i < 1))
    assert (keep | base == keep).all() and not (keep & ~allowed).any()
    np.testing.assert_array_equal((keep & ~base).sum(1), np.minimum(2, (allowed & ~base).sum(1)))


@pytest.mark.equation("sparse-attention-block")
@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_computing_kept_blocks_only_equals_the_masked_dense_form(seed, L_q, L_k, block, causal):
    rng, L_k = np.random.default_rng(seed), L_q if causal else L_k
    q, k, v = (Tensor(rng.normal(size=(2, h, L, 3))) for h, L in ((4, L_q), (2, L_k), (2, L_k)))
    blocks = rng.random((-(-L_q // block), -(-L_k // block))) < 0.5
    keep = masks.expand_blocks(blocks, block, L_q, L_k, causal)
    sparse = block_sparse_attention(q, k, v, blocks, block, causal)
    np.testing.assert_allclose(sparse.data, scaled_dot_product_attention(q, k, v, keep).data, rtol=1e-11, atol=1e-12)


@pytest.mark.equation("sparse-attention-topk")
@given(seeds, st.integers(1, 7), st.booleans())
def test_top_k_keeps_the_largest_scores_and_all_of_them_is_dense(seed, k_keep, causal):
    rng = np.random.default_rng(seed)
    q, k, v = (Tensor(rng.normal(size=(1, 2, 5, 3))) for _ in range(3))
    keep = causal_mask(5) if causal else None
    scores = q.data @ k.data.swapaxes(-1, -2)
    chosen = topk_keep(scores, k_keep, keep)
    possible = np.arange(1, 6) if causal else np.full(5, 5)
    np.testing.assert_array_equal(chosen.sum(-1), np.broadcast_to(np.minimum(k_keep, possible), (1, 2, 5)))
    left_out = ~chosen if keep is None else ~chosen & keep
    worst = np.where(chosen, scores, np.inf).min(-1)
    assert (worst >= np.where(left_out, scores, -np.inf).max(-1)).all()
    if k_keep >= 5:
        dense = scaled_dot_product_attention(q, k, v, keep).data
        np.testing.assert_allclose(topk_attention(q, k, v, k_keep, keep).data, dense, rtol=1e-12)


def test_equal_scores_are_cut_at_the_earlier_key():
    np.testing.assert_array_equal(topk_keep(np.zeros((1, 4)), 2), [[True, True, False, False]])


Q = Tensor(np.ones((1, 2, 4, 3)))
BAD = {
    "w": (lambda: masks.window_mask(4, 0), "window_mask: w must be a positive integer, got 0"),
    "L": (lambda: masks.window_mask(0, 1), "window_mask: L_q must be a positive integer, got 0"),
    "fewer keys": (lambda: masks.strided_mask(4, 2, 3), "strided_mask: L_k must be at least L_q = 4, got 3"),
    "c": (lambda: masks.fixed_mask(4, 2, 3), "fixed_mask: c must be at most s = 2, got 3"),
    "r": (lambda: masks.dilated_mask(4, 2, -1), "dilated_mask: r must be a positive integer, got -1"),
    "sinks": (lambda: masks.sink_mask(4, 2, -1), "sink_mask: n_sink must be a non-negative integer, got -1"),
    "random": (
        lambda: masks.bigbird_blocks(4, 1, 0, -1, np.random.default_rng(0)),
        "bigbird_blocks: n_random must be a non-negative integer",
    ),
    "blocks": (
        lambda: masks.expand_blocks(np.ones((2, 2), bool), 2, 5, 5),
        r"expand_blocks: blocks must be boolean of shape \(3, 3\), got shape \(2, 2\)",
    ),
    "numbers": (lambda: block_sparse_attention(Q, Q, Q, np.ones((2, 2)), 2), "blocks must be boolean"),
    "block": (lambda: block_sparse_attention(Q, Q, Q, np.ones((2, 2), bool), 0), "block must be a positive integer"),
    "causal lengths": (
        lambda: masks.expand_blocks(np.ones((1, 2), bool), 4, 4, 8),
        "L_k must be L_q = 4 for a causal pattern",
    ),
    "k": (lambda: topk_attention(Q, Q, Q, 0), "k_keep must be a positive integer, got 0"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_global_token_outside_the_text_is_refused():
    with pytest.raises(IndexError, match=r"tokens must be in \[0, 4\), got 4"):
        masks.global_mask(4, 2, [4])
