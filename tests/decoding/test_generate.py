"""Generation: the cache changes nothing, rows do not disturb each other, and episodes end as they should."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import no_grad
from minillm.decoding import generate, interface
from minillm.decoding.samplers import probabilities, truncate
from minillm.models import Config, Decoder
from minillm.nn import KVCache

V = 17


def small_model(seed: int = 0, **changes) -> Decoder:
    settings = {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "context": 24, **changes}
    model = Decoder(Config(V, **settings), np.random.default_rng(seed))
    for parameter in model.parameters():  # large weights, so that laws differ between tokens and positions
        parameter.data *= 6.0 if parameter.ndim > 1 else 1.0
    return model


def prompts_of(B: int, L: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, size=(B, L))


@pytest.mark.equation("kv-cache", "thread-local-isolation")
@pytest.mark.parametrize("B", [1, 2, 5])
def test_threads_that_share_a_batch_of_prompts_do_not_show(B, monkeypatch):
    model, ids = small_model(), prompts_of(B, 7)
    alone, shared = model.new_cache(B), model.new_cache(B)
    monkeypatch.setattr(interface, "library_threads", lambda: 3)
    with no_grad():
        wanted = interface.last_logits(model, ids, alone)
        monkeypatch.setattr(interface, "THREADED_TOKENS", 1)
        found = interface.last_logits(model, ids, shared)
        assert shared.length == alone.length == 7
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        for after in (ids[:, :1], ids[:, 1:3]):  # and what follows reads what was written
            wanted, found = (interface.last_logits(model, after, cache) for cache in (alone, shared))
            np.testing.assert_allclose(found, wanted, atol=1e-4)
        with pytest.raises(ValueError, match="KVCache"):
            interface.last_logits(model, prompts_of(B, 20), shared)
        assert shared.length == 10


@pytest.mark.equation("kv-cache")
@given(
    st.sampled_from(["interleaved", "half"]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 1000),
)
@settings(max_examples=25)
def test_cached_logits_equal_full_recomputation_however_the_text_is_cut(pairing, n_kv_heads, tied, pieces, seed):
    model = small_model(seed, rope_pairing=pairing, n_kv_heads=n_kv_heads, tied=tied)
    ids = prompts_of(3, sum(pieces), seed)
    with no_grad():
        full = model(ids).data
        cache = model.new_cache(3, sum(pieces))
        start, cached = 0, []
        for n in pieces:
            cached.append(model(ids[:, start : start + n], cache).data)
            start += n
    np.testing.assert_allclose(np.concatenate(cached, 1), full, atol=2e-5 * np.abs(full).max())


@pytest.mark.equation("kv-cache", "sample-behaviour-logprob")
@pytest.mark.parametrize("law", [{}, {"temperature": 0.6, "top_k": 5, "top_p": 0.9}], ids=str)
def test_generated_log_probs_are_those_of_an_uncached_pass(law):
    model, prompts = small_model(), prompts_of(6, 3)
    result = generate(model, prompts, 12, np.random.default_rng(0), **law)
    with no_grad():
        logits = model(np.concatenate([prompts, result.tokens], 1)[:, :-1]).data[:, 2:]
    p = probabilities(truncate(logits.astype(np.float64), **law))
    expected = np.log(np.take_along_axis(p, result.tokens[..., None], -1)[..., 0])
    np.testing.assert_allclose(result.logprobs, expected, atol=2e-4)


@pytest.mark.equation("kv-cache")
@pytest.mark.parametrize("layers", [1, 2])
def test_dropping_the_first_cached_token_is_not_recomputing_the_shorter_text(layers):
    """Erratum 43: from the second layer on, what is cached for a token depends on the tokens before it."""
    model, ids = small_model(n_layers=layers), prompts_of(1, 8)
    with no_grad():
        shorter = model(ids[:, 1:]).data[:, -1]
        cache, dropped = model.new_cache(1), model.new_cache(1)
        model(ids[:, :7], cache)
        dropped.keys[:, :, :, :6], dropped.values[:, :, :, :6] = cache.keys[:, :, :, 1:7], cache.values[:, :, :, 1:7]
        dropped.advance(6)
        model._angles = model._angles[1:]  # the kept keys were turned by positions 1 to 6, so the new one is 7
        gap = np.abs(model(ids[:, 7:], dropped).data[:, -1] - shorter).max()
    assert gap < 1e-5 if layers == 1 else gap > 1e-2


@pytest.mark.equation("kv-cache-size", "wn-mqa-cache")
def test_the_cache_has_as_many_elements_as_the_formula_says():
    for H_kv in (1, 2, 4):
        cache = small_model(n_kv_heads=H_kv).new_cache(3, 10)
        assert cache.keys.size + cache.values.size == 2 * 2 * 3 * 10 * H_kv * 4
    many, one = (small_model(n_kv_heads=h).new_cache(3, 10).nbytes for h in (4, 1))
    assert many == 4 * one  # multi-query attention divides the cache by H


@pytest.mark.equation("wn-kv-bytes", "kv-cache-size")
@pytest.mark.parametrize(
    ("layers", "H_kv", "bytes_per_token"),
    [(40, 40, 819_200), (80, 8, 327_680), (80, 64, 2_621_440), (32, 8, 131_072)],
)
def test_bytes_per_token_of_the_llama_sizes(layers, H_kv, bytes_per_token):
    assert KVCache(layers, 1, H_kv, 1, 128, dtype=np.float16).nbytes == bytes_per_token


def test_a_row_does_not_depend_on_the_other_rows():
    model, prompts = small_model(), prompts_of(8, 4)
    together = generate(model, prompts, 10, np.random.default_rng(3), eos_id=2)
    for n in (1, 3):
        few = generate(model, prompts[:n], 10, np.random.default_rng(3), eos_id=2)
        T = few.tokens.shape[1]
        np.testing.assert_array_equal(few.tokens, together.tokens[:n, :T])
        np.testing.assert_array_equal(few.mask, together.mask[:n, :T])


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model, prompts = small_model(), prompts_of(4, 4)
    first, again, other = (generate(model, prompts, 10, np.random.default_rng(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.logprobs, again.logprobs)
    assert (first.tokens != other.tokens).any()


def test_copies_equal_repeated_prompts():
    model, prompts = small_model(), prompts_of(3, 4)
    shared = generate(model, prompts, 6, np.random.default_rng(0), copies=4)
    repeated = generate(model, prompts.repeat(4, 0), 6, np.random.default_rng(0))
    np.testing.assert_array_equal(shared.tokens, repeated.tokens)
    np.testing.assert_allclose(shared.logprobs, repeated.logprobs, atol=1e-5)


@pytest.mark.equation("greedy")
def test_greedy_generation_takes_the_most_likely_token_of_the_uncached_model():
    model, ids = small_model(), prompts_of(2, 3)
    result = generate(model, ids, 6, np.random.default_rng(0), temperature=0)
    with no_grad():
        for _ in range(6):
            ids = np.concatenate([ids, model(ids).data[:, -1].argmax(-1)[:, None]], 1)
    np.testing.assert_array_equal(result.tokens, ids[:, 3:])


@pytest.mark.equation("stop-conditions")
def test_terminated_and_truncated_are_told_apart():
    result = generate(small_model(), prompts_of(64, 3), 8, np.random.default_rng(0), eos_id=5)
    assert result.terminated.any() and result.truncated.any()
    np.testing.assert_array_equal(result.terminated, ~result.truncated)
    for tokens, logprobs, mask, terminated in zip(*result, strict=True):
        n = mask.sum()
        assert mask[:n].all() and not mask[n:].any()
        assert (tokens[n - 1] == 5) == terminated  # EOS itself is part of the episode
        assert (tokens[: n - 1] != 5).all() and (tokens[n:] == 5).all()
        assert (logprobs[n:] == 0).all() and (logprobs[:n] < 0).all()
        assert terminated or n == 8
    np.testing.assert_array_equal(result.lengths, result.mask.sum(1))


@pytest.mark.equation("stop-conditions")
def test_generation_stops_when_every_sequence_has_ended():
    model = small_model()
    first = generate(model, prompts_of(1, 3), 1, np.random.default_rng(0), temperature=0).tokens[0, 0]
    result = generate(model, prompts_of(1, 3), 8, np.random.default_rng(0), temperature=0, eos_id=int(first))
    assert result.tokens.shape == (1, 1) and result.terminated.all()


def test_without_eos_everything_is_truncated_and_padding_can_be_chosen():
    model = small_model()
    assert generate(model, prompts_of(2, 3), 4, np.random.default_rng(0)).truncated.all()
    padded = generate(model, prompts_of(64, 3), 8, np.random.default_rng(0), eos_id=5, pad_id=9)
    assert (padded.tokens[~padded.mask] == 9).all() and (~padded.mask).any()


def test_every_step_is_reported():
    seen = []
    result = generate(
        small_model(), prompts_of(2, 3), 5, np.random.default_rng(0), on_token=lambda ids: seen.append(ids.copy())
    )
    np.testing.assert_array_equal(np.stack(seen, 1), result.tokens)


def test_the_context_may_be_filled_and_not_more():
    model = small_model()  # context 24
    assert generate(model, prompts_of(1, 20), 5, np.random.default_rng(0)).tokens.shape == (1, 5)
    with pytest.raises(ValueError, match=r"at most 25 together .* got 20 \+ 6. Shorten the prompt"):
        generate(model, prompts_of(1, 20), 6, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        ([[1, 2], [3]], {}, ValueError, "all of one length"),
        ([1, 2], {}, ValueError, r"integers of shape \(B, L\)"),
        ([[0.5]], {}, ValueError, "integers"),
        (np.zeros((2, 0), int), {}, ValueError, "at least one token"),
        ([[V]], {}, IndexError, "17"),
        ([[-1]], {}, IndexError, "-1"),
        ([[1]], {"eos_id": V}, IndexError, r"eos_id must be in \[0, 17\), got 17"),
        ([[1]], {"copies": 0}, ValueError, "copies must be a positive integer"),
        ([[1]], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive integer"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_in_one_sentence(prompts, options, error, words):
    options = {"max_new_tokens": 3, **options}
    with pytest.raises(error, match=words):
        generate(small_model(), prompts, rng=np.random.default_rng(0), **options)
