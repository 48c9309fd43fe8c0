"""The divisor switch: what each value means, that micro-batches add up, and that masks really mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional.reductions import (
    REDUCTIONS,
    aggregate,
    aggregation_divisor,
    aggregation_weights,
    masked_mean,
)

seeds = st.integers(0, 2**32 - 1)
reductions = st.sampled_from(REDUCTIONS)
LENGTH = 9


def draw(seed: int, B: int = 5):
    rng = np.random.default_rng(seed)
    T = int(rng.integers(1, 7))
    mask = rng.random((B, T)) < 0.6
    mask[rng.integers(B)] = False
    return rng.normal(size=(B, T)), mask


def lengths_one_and_nine():
    mask = np.zeros((2, 9), bool)
    mask[0, 0] = mask[1] = True
    return mask


@pytest.mark.equation("loss-aggregation", "nll")
def test_lengths_one_and_nine_of_erratum_2_and_77():
    mask = lengths_one_and_nine()
    np.testing.assert_allclose(aggregation_weights(mask, "token-mean")[mask], 0.1)
    weights = aggregation_weights(mask, "seq-mean")
    assert weights[0, 0] == 0.5 and weights[1] == pytest.approx(0.0556, abs=5e-5)
    for total, expected in ((9.0, (10, 1, 1)), (18.0, (19, 1.9, 1.5))):
        terms = np.where(mask, np.array([[1.0], [total / 9]]), np.nan)
        got = [aggregate(terms, mask, name).item() for name in ("sum", "token-mean", "seq-mean")]
        assert got == pytest.approx(expected)


@pytest.mark.equation("loss-aggregation")
@given(seed=seeds)
@settings(max_examples=40)
def test_every_reduction_is_its_formula(seed):
    terms, mask = draw(seed)
    rows = [row[keep] for row, keep in zip(terms, mask, strict=True)]
    total = sum(row.sum() for row in rows)
    expected = {
        "token-mean": total / max(mask.sum(), 1),
        "seq-mean": sum(row.mean() if len(row) else 0 for row in rows) / len(rows),
        "seq-sum": total / len(rows),
        "constant": total / (len(rows) * LENGTH),
        "sum": total,
    }
    for name in REDUCTIONS:
        assert aggregate(terms, mask, name, length=LENGTH).item() == pytest.approx(expected[name], abs=1e-12)


@pytest.mark.equation("loss-aggregation")
@given(seed=seeds, reduction=reductions, cut=st.integers(0, 5))
@settings(max_examples=50)
def test_micro_batches_with_the_batchs_divisor_add_up(seed, reduction, cut):
    terms, mask = draw(seed)
    parts = [slice(0, cut), slice(cut, None)]
    divisors = [aggregation_divisor(mask[part], reduction, length=LENGTH) for part in parts]
    whole = aggregate(terms, mask, reduction, length=LENGTH).item()
    given_divisor = {} if reduction == "sum" else {"divisor": max(sum(divisors), 1)}
    if reduction != "sum":
        assert sum(divisors) == aggregation_divisor(mask, reduction, length=LENGTH)
    pieces = [aggregate(terms[p], mask[p], reduction, length=LENGTH, **given_divisor).item() for p in parts]
    assert sum(pieces) == pytest.approx(whole, abs=1e-12)


@pytest.mark.equation("loss-aggregation")
def test_without_the_divisor_token_means_of_micro_batches_do_not_add_up():
    mask, terms = lengths_one_and_nine(), np.array([[1.0], [2.0]]) * np.ones((2, 9))
    halves = [aggregate(terms[[i]], mask[[i]], "token-mean").item() for i in (0, 1)]
    assert np.mean(halves) == 1.5 and aggregate(terms, mask, "token-mean").item() == pytest.approx(1.9)


@pytest.mark.equation("loss-aggregation", "ppo-masked-mean")
@given(seed=seeds, reduction=reductions)
@settings(max_examples=40)
def test_masked_terms_have_no_effect_even_as_nan(seed, reduction):
    terms, mask = draw(seed)
    poisoned = Tensor(np.where(mask, terms, np.nan), requires_grad=True)
    value = aggregate(poisoned, mask, reduction, length=LENGTH)
    assert value.item() == aggregate(terms, mask, reduction, length=LENGTH).item()
    gradient = grad(value, poisoned).data
    assert np.isfinite(gradient).all() and (gradient[~mask] == 0).all()
    assert masked_mean(poisoned, mask).item() == pytest.approx(terms[mask].mean() if mask.any() else 0, abs=1e-14)


@pytest.mark.equation("loss-aggregation", "ppo-masked-mean")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_kept_gives_zero_and_no_gradient(reduction):
    for shape in [(2, 3), (0, 3), (2, 0)]:
        terms = Tensor(np.full(shape, np.nan), requires_grad=True)
        value = aggregate(terms, np.zeros(shape, bool), reduction, length=LENGTH)
        assert value.item() == 0 and (grad(value, terms).data == 0).all()
        assert masked_mean(terms, np.zeros(shape)).item() == 0


@pytest.mark.equation("loss-aggregation")
@given(seed=seeds)
@settings(max_examples=25)
def test_with_equal_lengths_the_means_agree_and_padding_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    terms, mask = rng.normal(size=(4, 5)), np.ones((4, 5), bool)
    values = [aggregate(terms, mask, r, length=5).item() for r in ("token-mean", "seq-mean", "constant")]
    assert values == pytest.approx([terms.mean()] * 3, abs=1e-14)
    wider = np.pad(terms, ((0, 0), (0, 3)), constant_values=np.inf)
    for reduction in REDUCTIONS:
        padded = aggregate(wider, np.pad(mask, ((0, 0), (0, 3))), reduction, length=5).item()
        assert padded == pytest.approx(aggregate(terms, mask, reduction, length=5).item(), abs=1e-14)


def test_masks_may_be_booleans_integers_or_floats_and_precision_stays():
    terms, mask = draw(0)
    single = Tensor(terms.astype(np.float32))
    values = [aggregate(single, mask.astype(kind), "seq-mean") for kind in (bool, int, float, np.float32)]
    assert len({value.item() for value in values}) == 1 and values[0].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"mask": np.ones((2, 2))}, "mask must be of the terms' shape"),
        ({"mask": np.full((2, 3), 0.5)}, "booleans, zeros and ones, got the value"),
        ({"mask": np.full((2, 3), np.nan)}, "booleans, zeros and ones, got the value"),
        ({"reduction": "constant"}, "length must be the largest response length"),
        ({"reduction": "constant", "length": 0}, "length must be a positive integer"),
        ({"divisor": 0}, "divisor must be a positive number"),
        ({"reduction": "sum", "divisor": 3}, "divisor must be left out"),
    ],
)
def test_errors_say_what_is_wanted(change, message):
    arguments = {"token_terms": np.ones((2, 3)), "mask": np.ones((2, 3)), **change}
    with pytest.raises(ValueError, match=message):
        aggregate(**arguments)
