"""Speculative decoding: the law of the result is the model's, by enumeration and as frequencies."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from minillm.decoding import Law, LookupDrafter, ModelDrafter, generate, speculative_generate
from minillm.decoding.speculative import Draft, acceptance_rate, residual_law, verify
from minillm.models import Config, Decoder
from tests.oracles.chain_model import Chain

pytestmark = pytest.mark.equation("speculative-decoding")


def random_laws(seed: int, n: int, V: int) -> np.ndarray:
    laws = np.random.default_rng(seed).dirichlet(np.full(V, 0.7), size=n)
    return laws


@given(st.integers(0, 10**6), st.integers(2, 8))
@settings(max_examples=50)
def test_accepting_or_resampling_gives_the_models_law(seed, V):
    p, q = random_laws(seed, 2, V)
    outcome = np.minimum(p, q) + (1 - acceptance_rate(p, q)) * residual_law(p, q)
    np.testing.assert_allclose(outcome, p, atol=1e-12)
    assert acceptance_rate(p, p) == pytest.approx(1.0)
    np.testing.assert_array_equal(residual_law(p, p), p)


def law_of_verify(q: np.ndarray, p: np.ndarray, cells: int) -> dict[tuple[int, ...], float]:
    """The law of what `verify` returns, over all drafts and a fine grid of its uniform numbers."""
    n, V = q.shape
    grid = (np.arange(cells) + 0.5) / cells
    found: dict[tuple[int, ...], float] = {}
    for tokens in product(range(V), repeat=n):
        weight = float(np.prod(q[np.arange(n), tokens])) / cells ** (n + 1)
        for uniforms in product(grid, repeat=n + 1):
            out = tuple(verify(Draft(np.array(tokens), q), p, np.array(uniforms)).tolist())
            found[out] = found.get(out, 0.0) + weight
    return found


def test_the_law_of_two_verified_proposals_by_enumeration():
    """Laws in twelfths, so that a grid of uniform numbers meets every cell equally often."""
    p = np.array([[6, 3, 3], [2, 8, 2], [3, 3, 6]]) / 12
    q = np.array([[3, 6, 3], [4, 4, 4]]) / 12
    found = law_of_verify(q, p, cells=12)
    first, second = np.zeros(3), np.zeros(3)
    for tokens, weight in found.items():
        first[tokens[0]] += weight
        if len(tokens) > 1:
            second[tokens[1]] += weight
    np.testing.assert_allclose(first, p[0], atol=1e-12)
    np.testing.assert_allclose(second / second.sum(), p[1], atol=1e-12)
    reached = 1 - sum(w for t, w in found.items() if len(t) == 1)
    assert reached == pytest.approx(acceptance_rate(p[0], q[0]), abs=1e-12)  # the second proposal was looked at
    complete = sum(w for t, w in found.items() if len(t) == 3)
    assert complete == pytest.approx(float(np.prod(acceptance_rate(p[:2], q))), abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "droppable"),
    [("other model", True), ("other model", False), ("same model", True), ("look-up", False), ("law changed", True)],
)
def test_frequencies_of_whole_texts_follow_the_model(kind, droppable):
    V, T, n = 3, 3, 600
    model, small = Chain(V, 0, droppable), Chain(V, 1, droppable)
    law, P = Law(), model.laws()
    if kind == "law changed":
        law, P = Law(temperature=0.6), model.laws(0.6)
    drafter = {
        "other model": ModelDrafter(small),
        "same model": ModelDrafter(model),
        "look-up": LookupDrafter(V, 1),
        "law changed": ModelDrafter(small),  # drafts at temperature 1 all the same
    }[kind]
    prompts = np.tile([[2, 0, 1, 0]], (n, 1))
    result = speculative_generate(model, drafter, prompts, T, np.random.default_rng(5), count=2, law=law)
    expected = np.array(list(model.texts(0, T, P).values()))
    counts = np.bincount(result.generation.tokens @ V ** np.arange(T)[::-1], minlength=V**T)
    assert chisquare(counts, n * expected).pvalue > 1e-3
    paths = np.concatenate([prompts[:, -1:], result.generation.tokens], 1)
    np.testing.assert_allclose(result.generation.logprobs, np.log(P[paths[:, :-1], paths[:, 1:]]), atol=1e-12)
    if kind == "same model":
        np.testing.assert_array_equal(result.accepted, result.proposed)  # nothing is ever rejected


def test_the_share_of_accepted_proposals_is_the_formulas():
    V, n = 4, 800
    model, small = Chain(V, 3), Chain(V, 4)
    result = speculative_generate(model, ModelDrafter(small), np.full((n, 1), 2), 3, np.random.default_rng(0), count=1)
    first = acceptance_rate(model.laws(), small.laws())  # by the token before
    expected = first @ model.laws()[2]  # the only proposal follows the first token, drawn from the model
    # Texts of three tokens: one without a proposal, one proposal, and perhaps one more place without.
    assert result.accepted.sum() / result.proposed.sum() == pytest.approx(expected, abs=0.06)


def tiny(seed: int, n_layers: int = 2) -> Decoder:
    config = Config(11, 16, n_layers, 4, 2, 24, context=24)
    model = Decoder(config, np.random.default_rng(seed))
    for parameter in model.parameters():
        parameter.data *= 6.0 if parameter.ndim > 1 else 1.0
    return model


@pytest.mark.equation("greedy", "kv-cache")
@pytest.mark.parametrize("count", [1, 4])
def test_greedy_speculation_is_greedy_decoding(count):
    model, prompts = tiny(0), np.random.default_rng(1).integers(0, 11, size=(2, 5))
    plain = generate(model, prompts, 19, np.random.default_rng(0), temperature=0, eos_id=3)
    law = Law(temperature=0, no_repeat_ngram=0)
    for drafter in (ModelDrafter(tiny(1, 1), law), ModelDrafter(model, law), LookupDrafter(11)):
        fast = speculative_generate(
            model, drafter, prompts, 19, np.random.default_rng(9), count=count, law=law, eos_id=3
        )
        np.testing.assert_array_equal(fast.generation.tokens, plain.tokens)
        np.testing.assert_array_equal(fast.generation.mask, plain.mask)
        np.testing.assert_array_equal(fast.generation.terminated, plain.terminated)
        assert (fast.passes <= plain.lengths).all()
    same = speculative_generate(
        model, ModelDrafter(model, law), prompts, 19, np.random.default_rng(9), count=count, law=law
    )
    assert (same.passes <= 1 + -(-18 // (count + 1))).all()  # one pass reads the prompt, then count + 1 tokens a pass


def test_penalties_hold_under_speculation():
    model, law = tiny(0), Law(temperature=0, no_repeat_ngram=2, repetition=1.3)
    prompts = np.random.default_rng(1).integers(0, 11, size=(3, 5))
    plain = generate(model, prompts, 12, np.random.default_rng(0), temperature=0, no_repeat_ngram=2, repetition=1.3)
    fast = speculative_generate(model, ModelDrafter(tiny(1), law), prompts, 12, np.random.default_rng(0), law=law)
    np.testing.assert_array_equal(fast.generation.tokens, plain.tokens)


@pytest.mark.equation("stop-conditions")
def test_accepted_tokens_behind_an_end_are_dropped():
    model = Chain(3, 0, context=40)
    result = speculative_generate(
        model, ModelDrafter(model), np.zeros((40, 1), int), 20, np.random.default_rng(0), count=5, eos_id=2, pad_id=1
    )
    tokens, mask, ended = result.generation.tokens, result.generation.mask, result.generation.terminated
    assert ended.any()
    for row, kept, over in zip(tokens, mask, ended, strict=True):
        n = kept.sum()
        assert (row[: n - 1] != 2).all() and (row[n - 1] == 2) == over and (row[n:] == 1).all()


class Liar:
    """Proposes tokens that its law could not give, or more than asked for."""

    def __init__(self, draft: Draft):
        self.draft = draft

    def begin(self, text):
        pass

    def propose(self, text, stream, count, rng):
        return self.draft


@pytest.mark.parametrize(
    ("drafter", "options", "error", "words"),
    [
        (Liar(Draft(np.array([0]), np.array([[0.0, 1.0, 0.0]]))), {}, ValueError, "law of token 0 must be above 0"),
        (Liar(Draft(np.zeros(9, int), np.ones((9, 3)) / 3)), {}, ValueError, "at most 4 tokens long, got 9"),
        (Liar(Draft(np.zeros(2, int), np.ones((2, 2)) / 2)), {}, ValueError, "the draft's laws must be of shape"),
        (LookupDrafter(3), {"count": 0}, ValueError, "count must be a positive integer"),
        (LookupDrafter(3), {"max_new_tokens": 99}, ValueError, "prompt and new tokens must be at most"),
        (LookupDrafter(3), {"eos_id": 3}, IndexError, r"eos_id must be in \[0, 3\)"),
        (LookupDrafter(3), {"prompts": [[1], [1, 2]]}, ValueError, "all of one length"),
    ],
)
def test_bad_requests_and_lying_drafters_are_refused(drafter, options, error, words):
    options = {"prompts": np.zeros((1, 2), int), "max_new_tokens": 8, **options}
    with pytest.raises(error, match=words):
        speculative_generate(Chain(3, 0), drafter, rng=np.random.default_rng(0), **options)


def test_bad_arguments_of_the_parts_are_refused():
    p = np.full((2, 3), 1 / 3)
    for function in (acceptance_rate, residual_law):
        with pytest.raises(ValueError, match="q must be of the shape of p"):
            function(p, p[:1])
    draft = Draft(np.array([1]), p[:1])
    with pytest.raises(ValueError, match="laws must be one for each of 1 tokens and one more"):
        verify(draft, p[:1], np.zeros(2))
    with pytest.raises(ValueError, match=r"uniforms must be of shape \(2,\)"):
        verify(draft, p, np.zeros(1))
    with pytest.raises(ValueError, match="n must be a positive integer"):
        LookupDrafter(3, 0)
    with pytest.raises(ValueError, match="vocab_size must be a positive integer"):
        LookupDrafter(0)
    small = ModelDrafter(Chain(3, 0, context=3))
    with pytest.raises(ValueError, match="text must be at most 3 tokens long"):
        speculative_generate(Chain(3, 1), small, np.zeros((1, 3), int), 4, np.random.default_rng(0))
