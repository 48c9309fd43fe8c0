"""Scoring held-out text: every token once, with as much of the past as asked for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import no_grad
from minillm.data import even_source
from minillm.models import Config, Decoder
from minillm.training.evaluate import Evaluation, evaluate
from minillm.training.step import BatchThreads

V = 7


def make_model(context: int = 8) -> Decoder:
    return Decoder(Config(V, 8, 1, 2, d_ff=8, context=context, init_std=0.5), np.random.default_rng(0))


def terms_one_by_one(model: Decoder, tokens: np.ndarray, past_of) -> float:
    """Minus the log-probability of every token but the first, each from a pass of its own over its past."""
    total = 0.0
    for t in range(1, len(tokens)):
        with no_grad():
            z = model(tokens[None, t - past_of(t) : t]).data[0, -1].astype(np.float64)
        total += math.log(np.exp(z).sum()) - z[tokens[t]]
    return total


@pytest.mark.equation("clm-loss")
def test_with_stride_one_every_token_sees_a_full_context():
    model, tokens = make_model(), np.random.default_rng(1).integers(0, V, size=25)
    result = evaluate(model, tokens, stride=1)
    assert result.n_targets == 24
    assert result.nll == pytest.approx(terms_one_by_one(model, tokens, lambda t: min(t, 8)), rel=1e-5)


@pytest.mark.equation("clm-loss")
@given(st.integers(2, 20), st.integers(1, 8), st.data())
@settings(max_examples=25)
def test_every_token_is_scored_once_whatever_the_windows(n, n_ctx, data):
    """A model that knows nothing of the past makes the sum independent of the windows."""
    model = make_model()
    for block in model.blocks:
        block.attention.w_out.data[...] = 0
    tokens = np.random.default_rng(n).integers(0, V, size=n)
    stride, batch_size = data.draw(st.integers(1, n_ctx)), data.draw(st.integers(1, 4))
    result = evaluate(model, tokens, n_ctx=n_ctx, stride=stride, batch_size=batch_size)
    assert result.n_targets == n - 1
    assert result.nll == pytest.approx(terms_one_by_one(model, tokens, lambda t: 1), rel=1e-5)


def test_a_smaller_stride_gives_a_longer_past_and_threads_change_nothing():
    model, tokens = make_model(), np.random.default_rng(1).integers(0, V, size=41)
    plain = evaluate(model, tokens)
    assert plain.nll == pytest.approx(terms_one_by_one(model, tokens, lambda t: (t - 1) % 8 + 1), rel=1e-5)
    with BatchThreads(2).running() as threads:
        assert evaluate(model, tokens, threads=threads).nll == pytest.approx(plain.nll, rel=1e-6)


@pytest.mark.equation("perplexity")
def test_bits_per_byte_charge_the_first_token_too():
    result = Evaluation(nll=99 * math.log(256), n_targets=99)
    assert result.bits_per_byte(100, 256) == pytest.approx(8)
    assert result.mean_nll == pytest.approx(math.log(256))


def test_the_floor_of_a_source_is_not_undercut():
    tokens = even_source().sample(np.random.default_rng(0), 2000)
    model = Decoder(Config(2, 8, 1, 2, context=8), np.random.default_rng(0))
    assert evaluate(model, tokens).mean_nll > even_source().entropy_rate()


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        (np.array([1]), {}, "one stream of at least two"),
        (np.ones((2, 3), int), {}, "one stream of at least two"),
        (np.arange(7), {"stride": 0}, r"stride must be in 1..8, the context, got 0"),
        (np.arange(7), {"stride": 9}, r"stride must be in 1..8, the context, got 9"),
        (np.arange(7), {"batch_size": 0}, "batch_size must be a positive integer"),
    ],
)
def test_bad_requests_are_refused(tokens, options, words):
    with pytest.raises(ValueError, match=words):
        evaluate(make_model(), tokens, **options)
