"""The tolerance rule, calibrated: another order of evaluation passes, an off-by-one does not."""

import numpy as np
import pytest

from tests.tolerance import Allowance, allowances, assert_within

DRAWS = 150
CASES = [(1, 0, 5), (1, 0, 64), (1, 0, 1000), (1, 1000, 64), (3, 1000, 5), (30, 0, 64), (100, 1000, 64)]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return [e / e.sum(-1, keepdims=True)]


def ascending_sum(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    total = np.zeros_like(z[..., :1])
    for j in range(z.shape[-1]):
        total = total + np.sort(e)[..., j : j + 1]
    return e * (1 / total)


def online(z):
    """Running maximum and running sum, one entry at a time, as a kernel does it block by block."""
    top, total = np.full_like(z[..., :1], -np.inf), np.zeros_like(z[..., :1])
    for j in range(z.shape[-1]):
        higher = np.maximum(top, z[..., j : j + 1])
        total = total * np.exp(top - higher) + np.exp(z[..., j : j + 1] - higher)
        top = higher
    return np.exp(z - top) / total


def in_base_two(z):
    e = np.exp2((z - z.max(-1, keepdims=True)) * np.float32(np.log2(np.e)))
    return e / e.sum(-1, keepdims=True)


def through_normaliser(z):
    top = z.max(-1, keepdims=True)
    return np.exp(z - (top + np.log(np.exp(z - top).sum(-1, keepdims=True))))


def last_entry_forgotten(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e[..., :-1].sum(-1, keepdims=True)


def shifted_by_one(z):
    return np.roll(softmax(z)[0], 1, axis=-1)


def normaliser_of_the_next_row(z):
    top = z.max(-1, keepdims=True)
    e = np.exp(z - top)
    return e / np.roll(e.sum(-1, keepdims=True), 1, axis=0)


def failures(candidate, cases=CASES, **how) -> float:
    """The share of draws that the rule rejects."""
    rng = np.random.default_rng(0)
    rejected = 0
    for scale, offset, n in cases:
        for _ in range(DRAWS):
            z = (offset + scale * rng.normal(size=(2, n))).astype(np.float32)
            (allowed,) = allowances(softmax, [z], K=n, rng=rng, **how)
            rejected += allowed.used(candidate(z)) > 1
    return rejected / (DRAWS * len(cases))


@pytest.mark.parametrize("candidate", [ascending_sum, online, in_base_two])
def test_another_order_of_evaluation_practically_never_fails(candidate):
    assert failures(candidate) <= 0.002


def test_subtracting_large_numbers_passes_when_their_size_is_named():
    """exp(z - LSE) cancels numbers of about 1000: the rule must be told, and then accepts it."""
    case = [(3, 1000, 5), (3, 1000, 64)]
    assert failures(through_normaliser, case, largest_summand=1010.0) == 0
    assert failures(through_normaliser, case) > 0.01


@pytest.mark.parametrize("candidate", [last_entry_forgotten, normaliser_of_the_next_row])
def test_an_off_by_one_always_fails(candidate):
    assert failures(candidate, [(1, 0, 5), (1, 0, 64), (1, 1000, 64)]) == 1


def test_a_shift_by_one_always_fails():
    assert failures(shifted_by_one) == 1


def test_plain_twice_the_error_would_reject_a_correct_program():
    """Why the rule perturbs its inputs: without that, a correct softmax in base two fails in most draws."""
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(DRAWS):
        z = (1000 + 3 * rng.normal(size=(2, 64))).astype(np.float32)
        truth = softmax(z.astype(np.float64))[0]
        error = np.abs(online(z) - truth).max()
        rejected += error > 2 * np.abs(softmax(z)[0] - truth).max()
    assert rejected > 0.1 * DRAWS


def test_nan_infinity_and_shape():
    allowance = Allowance(np.array([1.0, np.inf, 0.0]), largest=1e-6, rms=1e-6)
    assert allowance.used(np.array([1.0, np.inf, 0.0])) == 0
    assert allowance.used(np.array([np.nan, np.inf, 0.0])) == np.inf
    assert allowance.used(np.array([1.0, 3.0, 0.0])) == np.inf
    with pytest.raises(AssertionError):
        allowance.used(np.ones(2))


def test_a_systematic_error_hides_behind_one_large_entry_but_not_from_the_rms():
    reference = np.ones(100)
    allowance = Allowance(reference, largest=1e-3, rms=1e-6)
    assert allowance.used(reference + 1e-4) > 1


def test_a_reference_that_upcasts_is_refused():
    with pytest.raises(AssertionError, match="precision of its inputs"):
        allowances(lambda x: [x * np.ones(3)], [np.ones(3)], K=1, rng=np.random.default_rng(0))


def test_assert_within_reports(capsys):
    (allowed,) = allowances(softmax, [np.zeros((1, 4))], K=4, rng=np.random.default_rng(0))
    assert assert_within([np.full((1, 4), 0.25, np.float32)], [allowed], "softmax", ["value"]) == 0
    assert "softmax value: measured/allowed 0" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="of what is allowed"):
        assert_within([np.full((1, 4), 0.26, np.float32)], [allowed], "softmax")
