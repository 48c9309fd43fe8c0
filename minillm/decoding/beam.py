r"""Beam search: keep the b most likely continuations instead of one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.autograd import no_grad
from minillm.checks import require, require_positive
from minillm.decoding.interface import LanguageModel, Stops, check_lengths, check_tokens, checked_prompts, last_logits
from minillm.decoding.law import Law


class Beams(NamedTuple):
    """The best continuations of every prompt, best first.

    Shapes: tokens, mask (B, b, T); logprobs, scores, terminated (B, b). ``logprobs`` are sums of log-probabilities,
    ``scores`` what the continuations were ranked by; both are minus infinity where there are fewer texts than beams.
    """

    tokens: Int[np.ndarray, "B b T"]
    mask: Bool[np.ndarray, "B b T"]
    logprobs: Float[np.ndarray, "B b"]
    scores: Float[np.ndarray, "B b"]
    terminated: Bool[np.ndarray, "B b"]


def beam_search(
    model: LanguageModel,
    prompts: Int[np.ndarray, "B L"],
    max_new_tokens: int,
    *,
    beams: int = 4,
    length_penalty: float = 0.0,
    repetition: float = 1.0,
    no_repeat_ngram: int = 0,
    eos_id: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    pad_id: int | None = None,
) -> Beams:
    r"""Extend the b best continuations by every token and keep the b best of the results, at every step.

    A continuation is ranked by $\log p(y\mid x)/|y|^\alpha$; one that has ended keeps its place in the beam without
    being extended, for as long as b better ones do not push it out. With one beam this is greedy decoding, and with
    $V^T$ of them it is exact.

    Equation: `beam-search` keep $b$ best $\sum\log p$, optionally over $|y|^\alpha$
    Equation: `kv-cache` the cache follows the beams: rows are repeated and dropped with their continuations
    Shapes: prompts (B, L) -> tokens, mask (B, b, T); logprobs, scores, terminated (B, b)
    Raises: ValueError for prompts of unequal length, a setting out of range, a request longer than the context, or
        fewer continuations than beams (V to the power of T); IndexError for ids outside the vocabulary.
    Source: topics #9.
    Differs: as decoding maximises probability, it is no sample of the model's law.
    """
    law = Law(repetition=repetition, no_repeat_ngram=no_repeat_ngram)
    prompts, V = checked_prompts("beam_search", prompts), model.config.vocab_size
    (B, length), b = prompts.shape, beams
    check_lengths("beam_search", model, length, max_new_tokens)
    require_positive(beams, "beam_search", "beams", integer=True)
    enough = beams <= V ** min(max_new_tokens, 64)
    require(enough, "beam_search", "beams", f"at most V^T = {V}^{max_new_tokens} continuations", beams)
    require(bool(np.isfinite(length_penalty)), "beam_search", "length_penalty", "a finite number", length_penalty)
    stops = Stops("beam_search", V, eos_id, stop)
    if pad_id is not None:
        check_tokens("beam_search", "pad_id", pad_id, V)
    filler = stops.filler if pad_id is None else pad_id

    text = np.full((B * b, length + max_new_tokens), filler, np.int64)
    text[:, :length] = prompts.repeat(b, axis=0)
    logprobs = np.full((B, b), -np.inf)
    logprobs[:, 0] = 0.0  # all beams of a prompt start equal: only one of them counts
    lengths, running = np.zeros((B, b), np.int64), np.ones((B, b), bool)
    first_row = np.arange(B)[:, None] * b
    steps = 0
    with no_grad():
        cache = model.new_cache(B, length + max_new_tokens - 1)
        logits = last_logits(model, prompts, cache)
        cache.select(np.repeat(np.arange(B), b))
        logits = logits.repeat(b, axis=0)  # (B b, V)
        while True:
            adjusted = law.penalised(logits.astype(np.float64), text[:, : length + steps])
            extended = _log_softmax(adjusted).reshape(B, b, V) + logprobs[..., None]
            extended[~running] = -np.inf
            extended[~running, filler] = logprobs[~running]  # an ended one has itself as its only continuation
            new_lengths = lengths + running
            ranks = extended / np.maximum(new_lengths, 1)[..., None] ** length_penalty
            best = np.argsort(-ranks.reshape(B, b * V), axis=1, kind="stable")[:, :b]  # (B, b)
            parent, token = np.divmod(best, V)
            logprobs = np.take_along_axis(extended.reshape(B, b * V), best, 1)
            lengths, running = np.take_along_axis(new_lengths, parent, 1), np.take_along_axis(running, parent, 1)
            rows = (first_row + parent).ravel()
            text = text[rows]
            text[:, length + steps] = np.where(running, token, filler).ravel()
            steps += 1
            running &= ~stops.ended(text[:, length : length + steps]).reshape(B, b)
            if steps == max_new_tokens or not running.any():
                break
            cache.select(rows)
            logits = last_logits(model, text[:, length + steps - 1 : length + steps], cache)
    tokens = text[:, length : length + steps].reshape(B, b, steps)
    mask = np.arange(steps) < lengths[..., None]
    return Beams(tokens, mask, logprobs, logprobs / lengths**length_penalty, ~running)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
