"""Sampling laws: against transformers' logits warpers, against their definitions, and as frequencies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from minillm.decoding.penalties import apply_penalties, keep_typical
from minillm.decoding.samplers import (
    apply_temperature,
    greedy,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    probabilities,
    sample,
    truncate,
)

SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.8},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.7, "min_p": 0.3},
]


def random_logits(seed: int, rows: int = 5, V: int = 11, dtype=np.float32) -> np.ndarray:
    return (2.5 * np.random.default_rng(seed).normal(size=(rows, V))).astype(dtype)


def warped_by_transformers(logits, temperature=None, top_k=None, top_p=None, min_p=None):
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.from_numpy(logits)
    for setting, warper in (
        (temperature, warpers.TemperatureLogitsWarper),
        (top_k, warpers.TopKLogitsWarper),
        (top_p, warpers.TopPLogitsWarper),
        (min_p, warpers.MinPLogitsWarper),
    ):
        if setting is not None:
            scores = warper(setting)(None, scores)
    return scores.numpy()


@pytest.mark.equation("sample-temperature", "sample-top-k", "sample-top-p", "sample-combine", "sample-penalties")
@pytest.mark.parametrize("law", SETTINGS, ids=str)
def test_the_law_is_that_of_transformers(law):
    for seed in range(20):
        logits = random_logits(seed)
        np.testing.assert_allclose(truncate(logits, **law), warped_by_transformers(logits, **law), rtol=1e-6)


@pytest.mark.equation("sample-temperature")
def test_temperature_flattens_above_one_and_sharpens_below():
    logits = random_logits(0)
    p, flat, sharp = (probabilities(apply_temperature(logits, T)) for T in (1.0, 2.0, 0.5))

    def entropy(q):
        return -(q * np.log(q)).sum(-1)

    assert (entropy(flat) > entropy(p)).all() and (entropy(sharp) < entropy(p)).all()
    np.testing.assert_allclose(sharp, p**2 / (p**2).sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.equation("greedy", "sample-temperature")
def test_greedy_is_the_limit_of_low_temperature():
    logits = random_logits(1)
    uniforms = np.random.default_rng(0).random(len(logits))
    np.testing.assert_array_equal(sample(logits, uniforms, temperature=1e-3).ids, greedy(logits))
    drawn = sample(logits, uniforms, temperature=0)
    np.testing.assert_array_equal(drawn.ids, greedy(logits))
    np.testing.assert_array_equal(drawn.logprobs, 0)  # the law that was sampled is a point
    np.testing.assert_array_equal(greedy(np.zeros((2, 4), np.float32)), [0, 0])  # ties: the first


@pytest.mark.equation("sample-top-k")
@given(st.integers(0, 10**6), st.integers(1, 14))
@settings(max_examples=50)
def test_top_k_keeps_exactly_k_of_the_largest_even_with_ties(seed, k):
    logits = np.random.default_rng(seed).integers(0, 3, size=(4, 12)).astype(np.float32)
    kept = np.isfinite(keep_top_k(logits, k))
    assert (kept.sum(-1) == min(k, 12)).all()
    for row, keep in zip(logits, kept, strict=True):
        assert k >= 12 or row[keep].min() >= row[~keep].max()


@pytest.mark.equation("sample-top-p")
@given(st.integers(0, 10**6), st.floats(1e-6, 1.0))
@settings(max_examples=50)
def test_the_nucleus_is_the_smallest_set_with_that_mass(seed, p):
    logits = random_logits(seed, dtype=np.float64)
    for row, keep in zip(probabilities(logits), np.isfinite(keep_top_p(logits, p)), strict=True):
        assert keep.any()  # always at least one
        assert row[keep].sum() >= p - 1e-12
        assert row[keep].sum() - row[keep].min() < p + 1e-12  # without its least likely one it would be too small
        assert keep.all() or row[keep].min() >= row[~keep].max()


@pytest.mark.equation("sample-penalties")
def test_min_p_keeps_what_is_at_least_that_share_of_the_largest():
    logits = random_logits(3, dtype=np.float64)
    p = probabilities(logits)
    np.testing.assert_array_equal(np.isfinite(keep_min_p(logits, 0.1)), p >= 0.1 * p.max(-1, keepdims=True))
    assert keep_min_p(logits, 0.0) is logits


@pytest.mark.equation("sample-penalties")
@pytest.mark.parametrize("mass", [0.2, 0.6, 0.95])
def test_typical_sampling_is_that_of_transformers(mass):
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    for seed in range(10):
        logits = random_logits(seed)
        theirs = warpers.TypicalLogitsWarper(mass)(None, torch.from_numpy(logits)).numpy()
        np.testing.assert_array_equal(keep_typical(logits, mass), theirs)
    assert keep_typical(logits, 1.0) is logits


@pytest.mark.equation("sample-penalties")
def test_penalties_are_those_of_transformers_and_of_the_definition():
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits, text = random_logits(0), np.random.default_rng(1).integers(0, 11, size=(5, 6))
    counts = np.stack([np.bincount(row, minlength=11) for row in text])
    theirs = warpers.RepetitionPenaltyLogitsProcessor(1.7)(torch.from_numpy(text), torch.from_numpy(logits.copy()))
    np.testing.assert_allclose(apply_penalties(logits, counts, repetition=1.7), theirs.numpy(), rtol=1e-6)
    penalised = apply_penalties(logits, counts, frequency=0.3, presence=0.5)
    np.testing.assert_allclose(penalised, logits - 0.3 * counts - 0.5 * (counts > 0), rtol=1e-5)
    np.testing.assert_array_equal(apply_penalties(logits, counts), logits)  # neutral values


def test_penalties_out_of_range_are_refused():
    logits, counts = random_logits(0), np.zeros((5, 11), int)
    with pytest.raises(ValueError, match="repetition must be a positive number"):
        apply_penalties(logits, counts, repetition=0.0)
    with pytest.raises(ValueError, match=r"counts must be of shape \(5, 11\)"):
        apply_penalties(logits, counts[:2])
    with pytest.raises(ValueError, match=r"mass must be in \(0, 1\]"):
        keep_typical(logits, 0.0)


@pytest.mark.equation("sample-combine")
def test_the_order_is_temperature_then_top_k_then_top_p():
    p = np.array([[0.4, 0.3, 0.2, 0.1]])
    logits = np.log(p)
    # Within the first two of four the largest has 4/7 of the mass; within all four only 0.4.
    together = np.isfinite(truncate(logits, top_k=2, top_p=0.5))
    np.testing.assert_array_equal(together, [[True, False, False, False]])
    np.testing.assert_array_equal(np.isfinite(keep_top_k(keep_top_p(logits, 0.5), 2)), [[True, True, False, False]])
    # At half the temperature the first two have (16 + 9) / 30 of the mass.
    np.testing.assert_array_equal(np.isfinite(truncate(logits, 0.5, top_p=0.8)), [[True, True, False, False]])


@pytest.mark.equation("sample-behaviour-logprob")
@pytest.mark.parametrize("law", SETTINGS, ids=str)
def test_the_log_prob_is_that_of_the_law_sampled(law):
    logits = random_logits(4, rows=200, dtype=np.float64)
    drawn = sample(logits, np.random.default_rng(0).random(200), **law)
    rows = np.arange(200)
    np.testing.assert_allclose(
        drawn.logprobs, np.log(probabilities(truncate(logits, **law))[rows, drawn.ids]), atol=1e-12
    )
    assert (
        np.abs(drawn.logprobs - np.log(probabilities(logits)[rows, drawn.ids])).max() > 0.1
    )  # not the model's at T = 1


@pytest.mark.equation("sample-behaviour-logprob")
@pytest.mark.parametrize("law", [{}, *SETTINGS], ids=str)
def test_frequencies_follow_the_law(law):
    logits, n = random_logits(5, rows=1, V=8), 20_000
    drawn = sample(np.repeat(logits, n, 0), np.random.default_rng(7).random(n), **law)
    p = probabilities(truncate(logits.astype(np.float64), **law))[0]
    counts = np.bincount(drawn.ids, minlength=8)
    assert (counts[p == 0] == 0).all()
    if (p > 0).sum() > 1:
        assert chisquare(counts[p > 0], n * p[p > 0] / p.sum()).pvalue > 1e-3


def test_an_excluded_token_is_never_drawn_at_the_edges():
    logits = np.array([[-np.inf, 0.0, -np.inf, 0.0, -np.inf]] * 4, np.float32)
    uniforms = np.array([0.0, 0.5 - 1e-12, 0.5, 1 - 2.0**-53])
    np.testing.assert_array_equal(sample(logits, uniforms).ids, [1, 1, 3, 3])


def test_float32_logits_give_float32_log_probs():
    assert sample(random_logits(0), np.full(5, 0.5), 0.8, 4, 0.9, 0.1).logprobs.dtype == np.float32


@pytest.mark.parametrize(
    ("law", "words"),
    [
        ({"temperature": -1.0}, "temperature must be a positive number, got -1.0"),
        ({"top_k": 0}, "k must be a positive integer, got 0"),
        ({"top_p": 0.0}, r"p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"p must be in \(0, 1\], got 1.5"),
        ({"min_p": -0.1}, r"p must be in \[0, 1\], got -0.1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(law, words):
    with pytest.raises(ValueError, match=words):
        sample(random_logits(0), np.full(5, 0.5), **law)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits = random_logits(0)
    logits[2, 3] = bad
    with pytest.raises(FloatingPointError, match="finite maximum"):
        sample(logits, np.full(5, 0.5))
