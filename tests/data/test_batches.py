"""Prefixes, chunks and windows: every pair is a token and its successor."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import IGNORE, BatchStream, next_token_chunks, prefix_samples, shift
from minillm.functional import losses

SENTENCE = ["LLMs", "learn", "to", "predict", "one", "word", "at", "a", "time"]
STORY = [
    "In",
    "the",
    "heart",
    "of",
    "the",
    "city",
    "stood",
    "the",
    "old",
    "library",
    ",",
    "a",
    "relic",
    "from",
    "a",
    "bygone",
    "era",
    ".",
]


@pytest.mark.equation("prefix-samples", "wn-pretrain-samples")
def test_nine_words_give_eight_samples():
    samples = prefix_samples(SENTENCE)
    assert len(SENTENCE) == 9 and len(samples) == 8
    assert samples[0] == (["LLMs"], "learn")
    assert samples[3] == (["LLMs", "learn", "to", "predict"], "one")
    assert samples[-1] == (SENTENCE[:8], "time")


@pytest.mark.equation("prefix-samples", "next-token-chunks")
@settings(max_examples=25)
@given(words=st.lists(st.integers(0, 99), min_size=2, max_size=20))
def test_one_shifted_pass_holds_all_prefix_samples(words):
    inputs, targets = shift(np.array(words))
    assert [(inputs[: n + 1].tolist(), targets[n]) for n in range(len(targets))] == prefix_samples(words)


@pytest.mark.equation("next-token-chunks", "wn-chunks")
def test_the_story_in_chunks_of_four():
    inputs, targets = next_token_chunks(STORY, 4)
    rows = [" ".join(row) for row in inputs]
    assert rows[:3] == ["In the heart of", "the city stood the", "old library , a"]
    assert [" ".join(row) for row in targets][:2] == ["the heart of the", "city stood the old"]


@pytest.mark.equation("next-token-chunks")
@settings(max_examples=50)
@given(n=st.integers(2, 60), n_ctx=st.integers(1, 12))
def test_every_token_but_the_first_is_a_target_once(n, n_ctx):
    tokens = np.arange(100, 100 + n)
    inputs, targets = next_token_chunks(tokens, n_ctx, last="pad", pad_id=7)
    assert inputs.shape == targets.shape == (-(-(n - 1) // n_ctx), n_ctx)
    kept = targets != IGNORE
    np.testing.assert_array_equal(targets[kept], tokens[1:])
    np.testing.assert_array_equal(inputs[kept], tokens[:-1])
    assert (inputs[~kept] == 7).all()
    if n > n_ctx:
        dropped = next_token_chunks(tokens, n_ctx)
        rows = (n - 1) // n_ctx
        np.testing.assert_array_equal(dropped.inputs, inputs[:rows])
        np.testing.assert_array_equal(dropped.targets, targets[:rows])


def test_the_ignored_label_is_the_one_that_the_loss_skips():
    assert IGNORE == losses.IGNORE


@pytest.mark.equation("next-token-chunks")
@settings(max_examples=40)
@given(n=st.integers(3, 50), n_ctx=st.integers(1, 20), batch_size=st.integers(1, 5), seed=st.integers(0, 99))
def test_windows_are_runs_of_the_stream(n, n_ctx, batch_size, seed):
    tokens = np.arange(n, dtype=np.uint16)
    if n <= n_ctx:
        with pytest.raises(ValueError, match="more than n_ctx"):
            BatchStream(tokens, n_ctx, batch_size, np.random.default_rng(seed))
        return
    inputs, targets = BatchStream(tokens, n_ctx, batch_size, np.random.default_rng(seed)).next_batch()
    assert inputs.shape == (batch_size, n_ctx) and inputs.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(n_ctx))
    np.testing.assert_array_equal(targets, inputs + 1)
    assert inputs.min() >= 0 and targets.max() < n


def test_windows_reach_both_ends_of_the_stream():
    stream = BatchStream(np.arange(10), 4, 500, np.random.default_rng(0))
    inputs, targets = next(stream)
    assert set(inputs[:, 0]) == set(range(6)) and targets.max() == 9
    assert stream.epochs == 200.0


@settings(max_examples=25)
@given(before=st.integers(0, 5), seed=st.integers(0, 99))
def test_a_resumed_stream_continues_to_the_bit(before, seed):
    tokens = np.random.default_rng(9).integers(50, size=300)
    first = BatchStream(tokens, 8, 3, np.random.default_rng(seed))
    for _ in range(before):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    expected = [next(first) for _ in range(3)]
    second = BatchStream(tokens, 8, 3, np.random.default_rng(12345))
    next(second)
    second.load_state_dict(state)
    assert second.batches_drawn == before
    for want, got in zip(expected, second, strict=False):
        np.testing.assert_array_equal(got.inputs, want.inputs)
        np.testing.assert_array_equal(got.targets, want.targets)


def test_a_saved_state_does_not_move_with_the_stream():
    stream = BatchStream(np.arange(100), 4, 2, np.random.default_rng(0))
    state = stream.state_dict()
    wanted = next(stream).inputs
    next(stream)
    stream.load_state_dict(state)
    np.testing.assert_array_equal(next(stream).inputs, wanted)


def test_states_of_other_runs_are_refused():
    rng = np.random.default_rng
    stream = BatchStream(np.arange(100), 4, 2, rng(0))
    for other in (
        BatchStream(np.arange(101), 4, 2, rng(0)),
        BatchStream(np.arange(100)[::-1], 4, 2, rng(0)),
        BatchStream(np.arange(100), 5, 2, rng(0)),
        BatchStream(np.arange(100), 4, 3, rng(0)),
    ):
        with pytest.raises(ValueError, match="Resume with the data and the sizes"):
            stream.load_state_dict(other.state_dict())
    for broken in ({}, {**stream.state_dict(), "rng": {"bit_generator": "MT19937"}}, {**stream.state_dict(), "rng": 3}):
        with pytest.raises(ValueError):
            stream.load_state_dict(broken)


def test_refusals():
    with pytest.raises(ValueError, match="at least two along the last axis"):
        shift(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="tokens must be at least 5, got 4"):
        next_token_chunks(np.arange(4), 4)
    with pytest.raises(ValueError, match="one stream"):
        next_token_chunks(np.zeros((4, 4)), 2)
    with pytest.raises(ValueError, match="n_ctx must be a positive integer"):
        next_token_chunks(np.arange(4), 0)
    with pytest.raises(ValueError, match="one stream of integer ids"):
        BatchStream(np.zeros(9), 2, 2, np.random.default_rng(0))
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        BatchStream(np.arange(9), 2, 0, np.random.default_rng(0))
