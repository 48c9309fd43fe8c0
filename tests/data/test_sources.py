"""Sources whose entropy rate is known: against closed forms, enumeration and their own samples."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import HiddenMarkovSource, bracket_source, even_source, markov_source, noisy_source

CHAIN = np.array([[0.9, 0.1], [0.2, 0.8]])
NOISY = noisy_source(CHAIN, np.array([[0.8, 0.2], [0.3, 0.7]]))


def xlogx(*p):
    return -sum(x * math.log(x) for x in p if x > 0)


def random_source(seed, n_states=3, vocab_size=2):
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(n_states * vocab_size, 0.7), size=n_states)
    return HiddenMarkovSource(transition.reshape(n_states, vocab_size, n_states))


def random_unifilar(seed, n_states=3, vocab_size=3):
    rng = np.random.default_rng(seed)
    transition = np.zeros((n_states, vocab_size, n_states))
    for state, law in enumerate(rng.dirichlet(np.ones(vocab_size), size=n_states)):
        follower = rng.integers(n_states, size=vocab_size)
        follower[0] = (state + 1) % n_states  # every state is reached
        transition[state, np.arange(vocab_size), follower] = law
    return HiddenMarkovSource(transition)


def word_probability(source, word):
    """Straight from the definition: all paths of states."""
    total = 0.0
    for path in itertools.product(range(source.n_states), repeat=len(word) + 1):
        p = source.stationary[path[0]]
        for s, x, t in zip(path, word, path[1:], strict=False):
            p *= source.transition[s, x, t]
        total += p
    return total


def test_closed_forms():
    # a fair coin; a chain with pi = (2/3, 1/3); the even process
    assert markov_source(np.array([[0.5, 0.5]])).entropy_rate() == pytest.approx(math.log(2))
    expected = 2 / 3 * xlogx(0.9, 0.1) + 1 / 3 * xlogx(0.2, 0.8)
    assert markov_source(CHAIN).entropy_rate() == pytest.approx(expected)
    assert even_source(0.5).entropy_rate() == pytest.approx(2 / 3 * math.log(2))
    p = 0.3
    assert even_source(p).entropy_rate() == pytest.approx(xlogx(p, 1 - p) / (2 - p))


def test_second_order_chains_look_two_symbols_back():
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]) * 0.98 + 0.01  # next is the exclusive or
    source = markov_source(rows)
    assert source.n_states == 4 and source.is_unifilar
    assert source.entropy_rate() == pytest.approx(xlogx(0.99, 0.01))
    tokens = source.sample(np.random.default_rng(0), 20_000)
    agree = (tokens[2:] == (tokens[1:-1] ^ tokens[:-2])).mean()
    assert agree == pytest.approx(0.99, abs=0.005)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_bounds_enclose_the_rate_and_close_in(seed):
    source = random_unifilar(seed)
    rate, before = source.entropy_rate(), (-np.inf, np.inf)
    for n in range(1, 7):
        low, high = source.entropy_rate_bounds(n)
        assert low <= rate + 1e-9 and rate <= high + 1e-9
        assert before[0] - 1e-9 <= low and high <= before[1] + 1e-9
        before = (low, high)
    assert low == pytest.approx(rate)  # unifilar: knowing the first state is knowing all


def test_bounds_of_a_source_that_is_not_unifilar_meet():
    assert not NOISY.is_unifilar
    gaps = [high - low for low, high in (NOISY.entropy_rate_bounds(n) for n in (2, 6, 12))]
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] > 0
    low, high = NOISY.entropy_rate_bounds(12)
    tokens = NOISY.sample(np.random.default_rng(1), 60_000)
    nll = NOISY.optimal_nll(tokens.reshape(60, 1000))
    error = nll.mean(1).std(ddof=1) / math.sqrt(60)
    assert abs(nll[:, 20:].mean() - (low + high) / 2) < 4 * error
    with pytest.raises(ValueError, match="Use entropy_rate_bounds"):
        NOISY.entropy_rate()


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), unifilar=st.booleans())
def test_the_optimal_predictor_is_the_sum_over_all_paths(seed, unifilar):
    source = random_unifilar(seed) if unifilar else random_source(seed)
    words = source.sample(np.random.default_rng(seed), 12).reshape(3, 4)
    nll = source.optimal_nll(words)
    assert nll.shape == words.shape
    for word, terms in zip(words, nll, strict=True):
        for n in range(1, 5):
            assert terms[:n].sum() == pytest.approx(-math.log(word_probability(source, word[:n])))
    np.testing.assert_allclose(source.optimal_nll(words[1]), nll[1])


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_probabilities_of_all_words_sum_to_one(seed):
    source = random_source(seed)
    words = np.array(list(itertools.product(range(source.vocab_size), repeat=5)))
    assert np.exp(-source.optimal_nll(words).sum(1)).sum() == pytest.approx(1)


@pytest.mark.parametrize("source", [bracket_source(), even_source(0.4), NOISY], ids=["brackets", "even", "noisy"])
def test_samples_follow_the_law(source):
    tokens = source.sample(np.random.default_rng(5), 50_000)
    symbols = source.stationary @ source.transition.sum(2)
    seen = np.bincount(tokens, minlength=source.vocab_size) / len(tokens)
    np.testing.assert_allclose(seen, symbols, atol=0.015)
    np.testing.assert_allclose(source.stationary @ source.transition.sum(1), source.stationary, atol=1e-12)
    np.testing.assert_array_equal(tokens[:100], source.sample(np.random.default_rng(5), 50_000)[:100])


def test_the_even_source_makes_even_runs_only():
    tokens = even_source().sample(np.random.default_rng(0), 5000)
    runs = [len(list(run)) for symbol, run in itertools.groupby(tokens) if symbol == 1]
    assert len(runs) > 100 and all(n % 2 == 0 for n in runs[1:-1])
    with pytest.raises(ValueError, match="a sequence that the source can emit"):
        even_source().optimal_nll(np.array([0, 1, 0]))


@pytest.mark.parametrize(("kinds", "depth"), [(1, 1), (2, 2), (3, 2), (2, 4)])
def test_brackets_nest_properly_and_have_a_known_rate(kinds, depth):
    source = bracket_source(kinds=kinds, depth=depth, letters=5)
    assert source.n_states == sum(kinds**d for d in range(depth + 1))
    assert source.vocab_size == 2 * kinds + 5 and source.is_unifilar
    tokens = source.sample(np.random.default_rng(2), 20_000)
    opened, deepest = [], 0
    for token in tokens.tolist():
        if token < kinds:
            opened.append(token)
            deepest = max(deepest, len(opened))
        elif token < 2 * kinds and opened:  # with nothing open it was opened before the sample began
            assert opened.pop() == token - kinds
    assert deepest == depth
    nll = source.optimal_nll(tokens.reshape(20, 1000))
    error = nll.mean(1).std(ddof=1) / math.sqrt(20)
    assert abs(nll[:, 100:].mean() - source.entropy_rate()) < 4 * error


def test_what_the_windows_cost_above_the_rate_is_small():
    source = bracket_source()
    windows = source.sample(np.random.default_rng(3), 128 * 1000).reshape(1000, 128)
    stream = source.optimal_nll(windows.reshape(1, -1)).mean()
    assert 0 < source.optimal_nll(windows)[:, 1:].mean() / stream - 1 < 0.01


def test_letters_depend_on_the_open_bracket():
    source = bracket_source(kinds=2, depth=1, letters=6)
    outside, inside_0, inside_1 = source.transition.sum(2)[:, 4:]
    assert [law.argmax() for law in (outside, inside_0, inside_1)] == [0, 2, 4]


def test_refusals():
    good = even_source().transition
    for wrong in (np.ones((2, 2)), np.ones((2, 2, 3)), 2 * good, -good, np.zeros((0, 2, 0))):
        with pytest.raises(ValueError, match="HiddenMarkovSource"):
            HiddenMarkovSource(wrong)
    apart = np.zeros((2, 1, 2))
    apart[0, 0, 0] = apart[1, 0, 1] = 1
    with pytest.raises(ValueError, match="single stationary distribution"):
        HiddenMarkovSource(apart)
    with pytest.raises(IndexError, match=r"every token must be in \[0, 2\)"):
        even_source().optimal_nll(np.array([0, 2]))
    with pytest.raises(ValueError, match="tokens must be integers"):
        even_source().optimal_nll(np.array([0.5]))
    with pytest.raises(ValueError, match="Take a smaller n"):
        bracket_source().entropy_rate_bounds(20)
    with pytest.raises(ValueError, match=r"\(V \*\* k, V\)"):
        markov_source(np.full((3, 2), 0.5))
    with pytest.raises(ValueError, match="noisy_source"):
        noisy_source(CHAIN, np.full((3, 2), 0.5))
    with pytest.raises(ValueError, match="sum below 1"):
        bracket_source(p_open=0.5, p_close=0.5)
    with pytest.raises(ValueError, match="depth must be a positive integer"):
        bracket_source(depth=0)
    with pytest.raises(ValueError, match="p must be between"):
        even_source(1.0)
