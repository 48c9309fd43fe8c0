"""The fused attention however its work is cut, and its cached form: both equal the equation as written."""

from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, no_grad
from minillm.functional import attention as written
from minillm.functional.positions import rotation_angles
from minillm.fused import attention as fused
from minillm.fused import attention_blocks as blocks
from minillm.nn.cache import KVCache
from tests import forms, strategies


@contextmanager
def cut(block: int, group_bytes: int, kept: bool = False):
    """Blocks and groups of a size that small problems have several of; probabilities kept or made again."""
    before = blocks.QUERY_BLOCK, blocks.GROUP_BYTES, blocks.KEPT_BYTES
    blocks.QUERY_BLOCK, blocks.GROUP_BYTES, blocks.KEPT_BYTES = block, group_bytes, 1 << 26 if kept else 0
    try:
        yield
    finally:
        blocks.QUERY_BLOCK, blocks.GROUP_BYTES, blocks.KEPT_BYTES = before


def problem(seed: int, B: int, L: int, H: int, H_kv: int, pairing: str):
    rng = np.random.default_rng(seed)
    how = {"angles": rotation_angles(np.arange(L), 4, 100.0), "H": H, "H_kv": H_kv, "pairing": pairing}
    return rng.normal(size=(B, L, (H + 2 * H_kv) * 4)), how


@pytest.mark.equation("mha", "gqa")
@settings(max_examples=20)
@given(
    seed=strategies.seeds(),
    B=st.integers(1, 5),
    L=st.integers(1, 9),
    heads=st.sampled_from([(2, 2), (4, 2), (2, 1)]),
    block=st.integers(1, 4),
    group=st.integers(1, 3),
    pairing=st.sampled_from(["interleaved", "half"]),
    kept=st.booleans(),
)
def test_groups_of_sequences_and_blocks_of_queries_do_not_show(seed, B, L, heads, block, group, pairing, kept):
    """Sizes that a real run reaches only with long contexts and large batches, made small here."""
    H, H_kv = heads
    qkv, how = problem(seed, B, L, H, H_kv, pairing)
    wanted = forms.evaluate(written.rotary_attention, (qkv,), how)
    with cut(block, 0):
        actual_block = blocks.block_size(L, causal=True)
    with cut(block, group * H * L * actual_block * qkv.itemsize, kept):
        work = blocks.tasks(B, H_kv, H // H_kv, L, L, qkv.itemsize, causal=True)
        assert len({task.rows.start for task in work}) == -(-B // group)
        found = forms.evaluate(fused.rotary_attention, (qkv,), how)
    for a, b in zip(found.arrays, wanted.arrays, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.equation("gqa", "cross-attention", "flash-attention", "sparse-attention-window")
@settings(max_examples=60)
@given(
    seed=strategies.seeds(),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    heads=st.sampled_from([(2, 2), (4, 2), (2, 1)]),
    pattern=st.sampled_from([{}, {"causal": True}, {"causal": True, "window": 1}, {"causal": True, "window": 3}]),
    keep_shape=st.sampled_from([None, "BHqk", "qk", "B11k", "1Hqk"]),
    bias_shape=st.sampled_from([None, "BHqk", "qk", "B11k", "1Hqk"]),
    block=st.integers(1, 4),
    group_bytes=st.sampled_from([1, 300, 1 << 20]),
    kept=st.booleans(),
)
def test_any_pattern_however_it_is_cut(seed, sizes, heads, pattern, keep_shape, bias_shape, block, group_bytes, kept):
    """Masks, biases, windows, other lengths of queries and keys, rows that see nothing; value and gradient."""
    rng, (B, L_q, L_k), (H, H_kv) = np.random.default_rng(seed), sizes, heads
    lengths = {"B": B, "H": H, "q": L_q, "k": L_k, "1": 1}
    keep, bias = (shape and rng.normal(size=[lengths[a] for a in shape]) for shape in (keep_shape, bias_shape))
    keep = None if keep is None else keep > -0.5
    q, k, v = (rng.normal(size=size) for size in ((B, H, L_q, 3), (B, H_kv, L_k, 3), (B, H_kv, L_k, 2)))
    wanted = forms.evaluate(written.scaled_dot_product_attention, (q, k, v, keep, bias), pattern)
    with cut(block, group_bytes, kept):
        found = forms.evaluate(fused.scaled_dot_product_attention, (q, k, v, keep, bias), pattern)
    for a, b in zip(found.arrays, wanted.arrays, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.equation("flash-attention")
def test_probabilities_are_kept_for_the_backward_pass_only_where_they_are_few():
    """And never where nothing is recorded."""
    q = np.ones((1, 1, 8, 2), np.float32)
    pattern = blocks.Pattern(8, 8)

    def kept(limit: int, keep: bool = True) -> list[bool]:
        with cut(1, 1):  # blocks of four queries
            blocks.KEPT_BYTES = limit
            q5, out, lse = q[:, :, None], np.empty((1, 1, 1, 8, 2), np.float32), np.empty((1, 1, 1, 1, 8), np.float32)
            work = blocks.tasks(1, 1, 1, 8, 8, 4, causal=False)
            return [p is not None for p in blocks.forward(q5, q5, q5, out, lse, pattern, work, keep)]

    assert kept(8 * 8 * 4) == [True, True]
    assert kept(8 * 8 * 4 - 1) == [False, False]
    assert kept(1 << 26, keep=False) == [False, False]


@pytest.mark.equation("kv-cache", "gqa")
@settings(max_examples=20)
@given(
    seed=strategies.seeds(),
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    heads=st.sampled_from([(2, 2), (4, 2), (2, 1)]),
    pairing=st.sampled_from(["interleaved", "half"]),
    layer=st.integers(0, 1),
)
def test_attention_in_pieces_through_the_cache_is_attention_at_once(seed, pieces, heads, pairing, layer):
    H, H_kv = heads
    L = sum(pieces)
    qkv, how = problem(seed, 2, L, H, H_kv, pairing)
    whole = written.rotary_attention(Tensor(qkv), **how).data
    cache = KVCache(2, 2, H_kv, L, 4, np.float64)
    start = 0
    for piece in pieces:
        rows = slice(start, start + piece)
        with no_grad():
            part = fused.cached_attention(
                Tensor(qkv[:, rows]), how["angles"][rows], cache, layer, H=H, H_kv=H_kv, pairing=pairing
            )
        cache.advance(piece)
        np.testing.assert_allclose(part.data, whole[:, rows], atol=1e-12)
        start += piece


@pytest.mark.equation("kv-cache")
def test_cached_attention_of_large_scores_does_not_overflow():
    qkv, how = problem(0, 1, 3, 1, 1, "interleaved")
    qkv *= 100
    cache = KVCache(1, 1, 1, 3, 4, np.float64)
    with no_grad():
        found = fused.cached_attention(Tensor(qkv), how["angles"], cache, 0, H=1, H_kv=1)
    np.testing.assert_allclose(found.data, written.rotary_attention(Tensor(qkv), **how).data, atol=1e-12)


def test_cached_attention_refuses_to_be_differentiated():
    qkv, how = problem(0, 1, 2, 1, 1, "interleaved")
    with pytest.raises(RuntimeError, match="decoding with a cache has no gradient"):
        fused.cached_attention(
            Tensor(qkv, requires_grad=True), how["angles"], KVCache(1, 1, 1, 2, 4, np.float64), 0, H=1, H_kv=1
        )
