"""Beam search: greedy with one beam, exact with enough of them, as transformers in between."""

import numpy as np
import pytest

from minillm.decoding import beam_search, generate
from minillm.models import Config, Decoder
from minillm.models.llama_weights import load_llama
from tests.oracles.chain_model import Chain

pytestmark = pytest.mark.equation("beam-search")


def tiny(seed: int, V: int = 11, **changes) -> Decoder:
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "context": 24, **changes}
    model = Decoder(Config(V, **sizes), np.random.default_rng(seed))
    for parameter in model.parameters():
        parameter.data *= 4.0 if parameter.ndim > 1 else 1.0
    return model


def prompts_of(B: int, L: int, V: int = 11) -> np.ndarray:
    return np.random.default_rng(1).integers(0, V, size=(B, L))


@pytest.mark.equation("greedy")
@pytest.mark.parametrize("eos_id", [None, 3])
def test_one_beam_is_greedy(eos_id):
    model, prompts = tiny(0), prompts_of(6, 4)
    greedy = generate(model, prompts, 10, np.random.default_rng(0), temperature=0, eos_id=eos_id)
    beams = beam_search(model, prompts, 10, beams=1, eos_id=eos_id)
    np.testing.assert_array_equal(beams.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(beams.mask[:, 0], greedy.mask)
    np.testing.assert_array_equal(beams.terminated[:, 0], greedy.terminated)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("eos_id", [None, 1])
def test_with_enough_beams_it_finds_the_best_of_all_texts(alpha, eos_id):
    V, T, start = 3, 4, 2
    model = Chain(V, 7)
    best: dict[tuple, float] = {}
    for text, p in model.texts(start, T).items():
        if eos_id in text:  # the same text for all that follows EOS
            text = text[: text.index(eos_id) + 1]
            p = model.texts(start, len(text))[text]
        best[text] = np.log(p) / len(text) ** alpha
    ranked = sorted(best.values(), reverse=True)
    beams = beam_search(model, np.array([[0, start]]), T, beams=V**T, length_penalty=alpha, eos_id=eos_id)
    np.testing.assert_allclose(beams.scores[0, : len(best)], ranked)
    found = [tuple(row[keep].tolist()) for row, keep in zip(beams.tokens[0], beams.mask[0], strict=True)][: len(best)]
    assert len(set(found)) == len(best)  # each of them once
    np.testing.assert_allclose([best[text] for text in found], ranked)
    np.testing.assert_array_equal(beams.terminated[0, : len(best)], [eos_id in text for text in found])
    assert np.isneginf(beams.scores[0, len(best) :]).all()  # places for which there is no text


def test_more_beams_find_better_texts_and_scores_are_those_of_the_model():
    model, prompts, T = tiny(2), prompts_of(5, 4), 6
    found = [beam_search(model, prompts, T, beams=b) for b in (1, 3, 11)]
    tops = np.array([result.logprobs[:, 0] for result in found])
    assert (tops[2] >= tops[0] - 1e-6).all() and (tops[2] > tops[0] + 0.05).any()
    for result in found:
        assert (np.diff(result.logprobs, axis=1) <= 1e-9).all()  # best first
        B, b, _ = result.tokens.shape
        whole = np.concatenate([prompts.repeat(b, 0), result.tokens.reshape(B * b, T)], 1)
        logits = model(whole[:, :-1]).data[:, 3:].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = np.take_along_axis(logp, whole[:, 4:, None], -1)[..., 0].sum(-1)
        np.testing.assert_allclose(result.logprobs.ravel(), total, atol=1e-4)


def test_a_length_penalty_prefers_longer_texts():
    model, prompts = tiny(2), prompts_of(16, 4)
    plain, longer = (beam_search(model, prompts, 12, beams=4, length_penalty=a, eos_id=3) for a in (0.0, 1.5))
    assert longer.mask[:, 0].sum() > plain.mask[:, 0].sum()


def test_the_beams_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=24, tie_word_embeddings=False, initializer_range=0.5,
            eos_token_id=None, bos_token_id=None,
        )
    ).eval()  # fmt: skip
    weights = {name: array.detach().numpy() for name, array in theirs.state_dict().items()}
    ours, prompts = load_llama(theirs.config.to_dict(), weights), prompts_of(3, 4, 13)
    out = theirs.generate(
        torch.from_numpy(prompts), attention_mask=torch.ones(3, 4), num_beams=4, num_return_sequences=4, max_new_tokens=7, do_sample=False,
        length_penalty=0.0, eos_token_id=None, pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    beams = beam_search(ours, prompts, 7, beams=4)
    np.testing.assert_array_equal(beams.tokens.reshape(12, 7), out.sequences.numpy()[:, 4:])
    np.testing.assert_allclose(beams.scores.ravel(), out.sequences_scores.numpy(), atol=1e-4)


def test_no_ngram_is_said_twice_when_that_is_asked_for():
    model, prompts = tiny(2), prompts_of(3, 4)
    beams = beam_search(model, prompts, 15, beams=3, no_repeat_ngram=2)
    for row, prompt in zip(beams.tokens, prompts, strict=True):
        for tokens in row:
            text = np.concatenate([prompt, tokens]).tolist()
            new = list(zip(text, text[1:], strict=False))[len(prompt) - 1 :]
            assert len(set(new)) == len(new)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"beams": 0}, ValueError, "beams must be a positive integer"),
        ({"beams": 122}, ValueError, r"at most V\^T = 11\^2 continuations"),
        ({"length_penalty": float("nan")}, ValueError, "length_penalty must be a finite number"),
        ({"repetition": 0.0}, ValueError, "repetition must be a positive number"),
        ({"eos_id": 11}, IndexError, r"eos_id must be in \[0, 11\)"),
        ({"pad_id": -1}, IndexError, r"pad_id must be in \[0, 11\)"),
        ({"stop": [[]]}, ValueError, "a stop sequence must be at least one token long"),
        ({"max_new_tokens": 30}, ValueError, "prompt and new tokens must be at most"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(options, error, words):
    options = {"max_new_tokens": 2, **options}
    with pytest.raises(error, match=words):
        beam_search(tiny(0), prompts_of(1, 3), **options)
