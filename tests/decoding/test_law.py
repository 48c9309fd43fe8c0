"""The law of the next token in one object, repetition controls, and the ways of stopping."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.decoding import Law, generate
from minillm.decoding.interface import LanguageModel, Stops
from minillm.decoding.penalties import apply_penalties
from minillm.decoding.repetition import count_tokens, forbid_repeated_ngrams
from minillm.decoding.samplers import draw, probabilities, sample, truncate
from minillm.models import Config, Decoder
from tests.oracles.chain_model import Chain

V = 11


def random_logits(seed: int, rows: int = 5, dtype=np.float32) -> np.ndarray:
    return (2.5 * np.random.default_rng(seed).normal(size=(rows, V))).astype(dtype)


def texts(seed: int, L: int = 9, rows: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, size=(rows, L))


@pytest.mark.equation("sample-penalties")
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 30))
@settings(max_examples=40)
def test_forbidden_tokens_are_those_that_would_say_an_ngram_again(seed, n, L):
    text = np.random.default_rng(seed).integers(0, 4, size=(2, L))
    logits = random_logits(seed, rows=2)
    found = forbid_repeated_ngrams(logits, text, n)
    for row, seen, before in zip(found, text.tolist(), logits, strict=True):
        ngrams = {tuple(seen[i : i + n]) for i in range(L - n + 1)}
        for v in range(V):
            would_repeat = tuple((seen + [v])[-n:]) in ngrams
            assert row[v] == (-np.inf if would_repeat else before[v])


@pytest.mark.equation("sample-penalties")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_ngram_control_is_that_of_transformers(n):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    for seed in range(10):
        text, logits = np.random.default_rng(seed).integers(0, 5, size=(5, 12)), random_logits(seed)
        theirs = processors.NoRepeatNGramLogitsProcessor(n)(torch.from_numpy(text), torch.from_numpy(logits.copy()))
        np.testing.assert_array_equal(forbid_repeated_ngrams(logits, text, n), theirs.numpy())


def test_tokens_are_counted_row_by_row():
    text = texts(0)
    np.testing.assert_array_equal(count_tokens(text, V), [np.bincount(row, minlength=V) for row in text])
    np.testing.assert_array_equal(count_tokens(text[:, :0], V), np.zeros((5, V)))


@pytest.mark.equation("sample-combine", "sample-penalties", "sample-behaviour-logprob")
def test_a_law_is_penalties_then_temperature_then_truncation():
    logits, text = random_logits(0, dtype=np.float64), texts(1)
    law = Law(0.7, top_k=6, top_p=0.9, min_p=0.05, repetition=1.3, frequency=0.2, presence=0.1)
    counts = count_tokens(text, V)
    penalised = apply_penalties(logits, counts, repetition=1.3, frequency=0.2, presence=0.1)
    wanted = truncate(penalised, 0.7, 6, 0.9, 0.05)
    np.testing.assert_array_equal(law.logits(logits, text), wanted)
    np.testing.assert_allclose(law.probabilities(logits, text), probabilities(wanted))
    uniforms = np.random.default_rng(0).random(5)
    drawn = law.draw(logits, text, uniforms)
    np.testing.assert_array_equal(drawn.ids, draw(wanted, uniforms).ids)
    p = law.probabilities(logits, text)[np.arange(5), drawn.ids]
    np.testing.assert_allclose(drawn.logprobs, np.log(p), atol=1e-12)


@pytest.mark.equation("greedy", "sample-temperature")
def test_temperature_zero_is_a_law_with_one_token():
    logits, text = random_logits(0), texts(1)
    law = Law(temperature=0, repetition=3.0)
    best = law.penalised(logits, text).argmax(-1)
    np.testing.assert_array_equal(law.probabilities(logits, text), np.eye(V)[best])
    drawn = law.draw(logits, text, np.full(5, 0.9))
    np.testing.assert_array_equal(drawn.ids, best)
    np.testing.assert_array_equal(drawn.logprobs, 0)


def test_the_neutral_law_is_the_models():
    logits, text = random_logits(0, dtype=np.float64), texts(1)
    assert Law().logits(logits, text) is logits and not Law().reads_text
    np.testing.assert_allclose(Law(typical_p=1.0, top_p=1.0).probabilities(logits, text), probabilities(logits))
    uniforms = np.random.default_rng(0).random(5)
    np.testing.assert_array_equal(Law().draw(logits, text, uniforms).ids, sample(logits, uniforms).ids)


@pytest.mark.equation("sample-penalties")
@pytest.mark.parametrize(
    "law", [{"repetition": 1.5}, {"frequency": 1.0}, {"presence": 2.0}, {"typical_p": 0.5}, {"no_repeat_ngram": 2}]
)
def test_generation_samples_the_law_that_was_asked_for(law):
    """The log-probabilities returned are those of the uncached law on the text up to there."""
    model = Decoder(Config(V, 16, 2, 4, 2, 24, context=24), np.random.default_rng(0))
    for parameter in model.parameters():
        parameter.data *= 6.0 if parameter.ndim > 1 else 1.0
    prompts = texts(3, 4, 3)
    result = generate(model, prompts, 10, np.random.default_rng(0), **law)
    whole = np.concatenate([prompts, result.tokens], 1)
    logits = model(whole[:, :-1]).data
    for t in range(10):
        p = Law(**law).probabilities(logits[:, 3 + t], whole[:, : 4 + t])
        np.testing.assert_allclose(
            result.logprobs[:, t], np.log(p[np.arange(3), result.tokens[:, t]]), atol=2e-4, err_msg=str(t)
        )
    plain = generate(model, prompts, 10, np.random.default_rng(0))
    assert (plain.tokens != result.tokens).any()
    if "no_repeat_ngram" in law:
        for row in whole.tolist():
            pairs = list(zip(row, row[1:], strict=False))[3:]
            assert len(set(pairs)) == len(pairs)


@pytest.mark.equation("stop-conditions")
def test_several_ends_and_sequences_stop_a_text():
    model, n = Chain(4, 0, context=40), 60
    result = generate(
        model, np.zeros((n, 1), int), 20, np.random.default_rng(0), eos_id=[3], stop=[[1, 2], [2, 2, 0]], pad_id=0
    )
    ended_by = {"token": 0, "pair": 0, "triple": 0}
    for tokens, mask, terminated in zip(result.tokens, result.mask, result.terminated, strict=True):
        kept = tokens[mask].tolist()
        endings = {"token": kept[-1:] == [3], "pair": kept[-2:] == [1, 2], "triple": kept[-3:] == [2, 2, 0]}
        assert terminated == any(endings.values()) and (terminated or len(kept) == 20)
        for name, ended in endings.items():
            ended_by[name] += ended
        before = kept[:-1]
        assert 3 not in before and (1, 2) not in list(zip(before, before[1:], strict=False))
        assert (tokens[~mask] == 0).all()
    assert all(ended_by.values())


@pytest.mark.equation("stop-conditions")
def test_stops_see_new_tokens_only_and_need_all_of_a_sequence():
    stops = Stops("here", 5, None, [[1, 2]])
    np.testing.assert_array_equal(stops.ended(np.array([[2], [1]])), [False, False])
    np.testing.assert_array_equal(stops.ended(np.array([[1, 2], [2, 1], [0, 2]])), [True, False, False])
    assert stops.filler == 0 and Stops("here", 5, (4, 2)).filler == 4


def test_models_answer_to_the_interface():
    assert isinstance(Decoder(Config(V, 8, 1, 2), np.random.default_rng(0)), LanguageModel)
    assert isinstance(Chain(3, 0), LanguageModel) and not isinstance(object(), LanguageModel)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"temperature": -1.0}, "the temperature must be a non-negative number, got -1.0"),
        ({"temperature": float("nan")}, "the temperature must be"),
        ({"top_k": 0}, "top_k must be a positive integer"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"typical_p": 1.5}, r"typical_p must be in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"repetition": 0.0}, "repetition must be a positive number"),
        ({"frequency": float("inf")}, "frequency must be a finite number"),
        ({"presence": float("nan")}, "presence must be a finite number"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be a non-negative integer"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        Law(**setting)
    with pytest.raises(ValueError, match=words):
        generate(Chain(3, 0), np.zeros((1, 1), int), 2, np.random.default_rng(0), **setting)


def test_bad_arguments_are_refused():
    logits, text = random_logits(0), texts(0)
    with pytest.raises(ValueError, match="n must be a positive integer"):
        forbid_repeated_ngrams(logits, text, 0)
    with pytest.raises(ValueError, match=r"text must be of shape \(B=5, L\)"):
        forbid_repeated_ngrams(logits, text[:2], 2)
    with pytest.raises(ValueError, match="Every token would repeat"):
        forbid_repeated_ngrams(logits[:1], np.arange(V)[None], 1)
    with pytest.raises(IndexError, match=r"tokens must be in \[0, 5\)"):
        count_tokens(text, 5)
    with pytest.raises(ValueError, match=r"uniform numbers must be of shape \(5,\)"):
        draw(logits, np.zeros(3))
    with pytest.raises(FloatingPointError, match="finite maximum"):
        Law().draw(np.full((1, 3), np.nan), text[:1], np.zeros(1))
    with pytest.raises(IndexError, match=r"a stop sequence must be in \[0, 3\), got 7"):
        generate(Chain(3, 0), np.zeros((1, 1), int), 2, np.random.default_rng(0), stop=[[7]])
