"""Masks: what they hide and nothing else, their algebra, and the errata about them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.functional import masks
from minillm.functional.attention import attention_weights, scaled_dot_product_attention


@pytest.mark.equation("mask-full", "mask-causal")
@given(st.integers(1, 6), st.integers(0, 4))
def test_causal_is_the_lower_triangle_with_its_diagonal(L, cached):
    """Erratum 30: a strict mask would leave the first row empty."""
    keep = masks.causal_mask(L, L + cached)
    wanted = [[j <= i + cached for j in range(L + cached)] for i in range(L)]
    np.testing.assert_array_equal(keep, wanted)
    assert keep.any(-1).all() and masks.full_mask(L).all() and masks.full_mask(L, 2).shape == (L, 2)


@pytest.mark.equation("mask-prefix")
@given(st.integers(1, 9), st.data())
def test_prefix_mask_has_the_three_cases_of_the_source(L, data):
    """Erratum 32: written with positions from 1, as the source has it; i = m may be in either case."""
    m = data.draw(st.integers(0, L))

    def allowed(i, j):  # from 1
        return (i <= m and j <= m) or (i > m and j <= m) or (i > m and m < j <= i)

    wanted = [[allowed(i, j) for j in range(1, L + 1)] for i in range(1, L + 1)]
    np.testing.assert_array_equal(masks.prefix_mask(L, m), wanted)
    np.testing.assert_array_equal(masks.prefix_mask(L, 0), masks.causal_mask(L))
    np.testing.assert_array_equal(masks.prefix_mask(L, L), masks.full_mask(L))
    both = masks.prefix_mask(L, np.array([m, 0]))
    assert both.shape == (2, 1, L, L)
    np.testing.assert_array_equal(both[0, 0], masks.prefix_mask(L, m))
    np.testing.assert_array_equal(both[1, 0], masks.prefix_mask(L, 0))


@pytest.mark.equation("mask-padding", "mask-cross")
def test_padding_has_no_effect_whatever_it_holds():
    """Erratum 31: padding is not treated as normal tokens."""
    rng = np.random.default_rng(0)
    real = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    q, k, v = rng.normal(size=(2, 2, 3, 4)), rng.normal(size=(2, 2, 5, 4)), rng.normal(size=(2, 2, 5, 4))
    outputs = []
    for filler in (0.0, 50.0):
        k[0, :, 3:], v[0, :, 3:] = filler, -filler
        for mask in (masks.padding_mask(real), masks.cross_mask(real)):
            assert mask.shape == (2, 1, 1, 5)
            outputs.append(scaled_dot_product_attention(Tensor(q), Tensor(k), Tensor(v), mask).data)
    for other in outputs[1:]:
        np.testing.assert_array_equal(outputs[0], other)
    short = scaled_dot_product_attention(Tensor(q[:1]), Tensor(k[:1, :, :3]), Tensor(v[:1, :, :3])).data
    np.testing.assert_allclose(outputs[0][:1], short, rtol=1e-12)


@pytest.mark.equation("mask-block-diagonal")
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2), st.integers(0, 99))
def test_packed_documents_attend_as_if_alone(lengths, padding, seed):
    L, rng = sum(lengths) + padding, np.random.default_rng(seed)
    segments = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), np.full(padding, -1)])[None]
    q, k, v = (rng.normal(size=(1, 2, L, 3)) for _ in range(3))
    packed = scaled_dot_product_attention(*map(Tensor, (q, k, v)), masks.document_mask(segments)).data
    start = 0
    for n in lengths:
        part = [Tensor(a[:, :, start : start + n]) for a in (q, k, v)]
        alone = scaled_dot_product_attention(*part, causal=True).data
        np.testing.assert_allclose(packed[:, :, start : start + n], alone, atol=1e-13)
        start += n
    assert not packed[:, :, start:].any()


@pytest.mark.equation("mask-loss")
def test_only_the_answer_is_learnt_from():
    mask = masks.loss_mask(np.array([2, 0, 3]), np.array([4, 3, 3]), 5)
    np.testing.assert_array_equal(mask.astype(int), [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])


@pytest.mark.equation("mask-combine")
@given(st.integers(0, 2**16))
def test_and_of_masks_is_the_sum_of_what_is_added(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 1, 3, 4)) < 0.7, rng.random((3, 4)) < 0.7
    both = masks.combine_masks(a, b)
    np.testing.assert_array_equal(masks.additive_mask(both), masks.additive_mask(a) + masks.additive_mask(b))
    scores = rng.normal(size=(2, 1, 3, 4))
    weights = attention_weights(Tensor(scores), both).data
    with np.errstate(invalid="ignore"):
        e = np.exp(scores + masks.additive_mask(both, np.float64))
        wanted = np.where(e.sum(-1, keepdims=True) > 0, e / e.sum(-1, keepdims=True), 0)
    np.testing.assert_allclose(weights, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.padding_mask(np.ones((2, 3))), r"padding_mask: real must be boolean of shape \(B, L\)"),
        (lambda: masks.cross_mask(np.ones(3, bool)), r"cross_mask: real must be boolean of shape \(B, S\)"),
        (lambda: masks.prefix_mask(3, 4), "prefix_mask: the prefix must be integers in 0..3, the length, got 4"),
        (lambda: masks.prefix_mask(3, -1), "the prefix must be integers in 0..3, the length, got -1"),
        (lambda: masks.prefix_mask(0, 0), "prefix_mask: L must be a positive integer, got 0"),
        (lambda: masks.document_mask(np.ones((2, 3))), r"document_mask: segments must be integers of shape \(B, L\)"),
        (lambda: masks.loss_mask(np.array([3]), np.array([2]), 4), r"loss_mask: prompt lengths and lengths .* got \[3\] and \[2\]"),
        (lambda: masks.combine_masks(), "combine_masks: the masks must be at least one, got none"),
        (lambda: masks.combine_masks(np.ones(3)), "combine_masks: every mask must be boolean"),
        (lambda: masks.combine_masks(np.ones(3, bool), np.ones(2, bool)), r"broadcast to each other, got \(3,\) and \(2,\)"),
        (lambda: masks.additive_mask(np.ones(3)), "additive_mask: the mask must be boolean"),
    ],
)  # fmt: skip
def test_masks_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
