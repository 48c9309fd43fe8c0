r"""Batched generation with a key/value cache."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.autograd import no_grad
from minillm.checks import require_positive
from minillm.decoding.interface import LanguageModel, Stops, check_lengths, check_tokens, checked_prompts, last_logits
from minillm.decoding.law import Law


class Generation(NamedTuple):
    r"""What was generated, prompts left out.

    Equation: `stop-conditions` an episode ends with EOS or a stop sequence (`terminated`) or at the maximal length (`truncated`)
    Shapes: tokens, logprobs, mask (B, T); terminated (B,)
    Source: notes §10.6.

    ``mask`` is true up to and including EOS or the stop sequence. Behind it tokens are the padding and log-probabilities 0.
    """

    tokens: Int[np.ndarray, "B T"]
    logprobs: Float[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    terminated: Bool[np.ndarray, " B"]

    @property
    def truncated(self) -> Bool[np.ndarray, " B"]:
        """Which sequences were cut off at the maximal length, without EOS."""
        return ~self.terminated

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """How many tokens each sequence has, EOS included."""
        return self.mask.sum(-1)


def generate(
    model: LanguageModel,
    prompts: Int[np.ndarray, "B L"],
    max_new_tokens: int,
    rng: np.random.Generator,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    no_repeat_ngram: int = 0,
    eos_id: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    pad_id: int | None = None,
    copies: int = 1,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> Generation:
    r"""Continue every prompt until EOS, a stop sequence or for ``max_new_tokens`` tokens.

    Equation: `kv-cache` every position is computed once; logits equal those of full recomputation
    Equation: `stop-conditions` terminated by EOS or a stop sequence, or truncated at the maximal length
    Equation: `sample-behaviour-logprob` log-probabilities of the law that was sampled
    Equation: `sample-penalties` repetition, frequency, presence, no-repeat n-gram, min-p and typical as in `Law`
    Shapes: prompts (B, L) -> tokens, logprobs, mask (B copies, T), terminated (B copies,); T <= max_new_tokens
    Raises: ValueError for prompts of unequal length, an empty prompt, a setting out of range, or when prompt and
        new tokens are longer than the model's context; IndexError for ids outside the vocabulary.
    Source: notes §4.3, §10.5.
    Differs: the cache keeps all positions while the context grows (erratum 43).

    ``copies`` continuations of a prompt lie next to each other and share the work of reading it. Temperature 0 is
    greedy. The random numbers of a row do not depend on what other rows do, nor on when they end. ``on_token`` is
    called with the ids (B copies,) of every step.
    """
    law = Law(temperature, top_k, top_p, min_p, typical_p, repetition, frequency, presence, no_repeat_ngram)
    prompts = checked_prompts("generate", prompts)
    length, V = prompts.shape[1], model.config.vocab_size
    check_lengths("generate", model, length, max_new_tokens)
    require_positive(copies, "generate", "copies", integer=True)
    stops = Stops("generate", V, eos_id, stop)
    if pad_id is not None:
        check_tokens("generate", "pad_id", pad_id, V)

    B = len(prompts) * copies
    uniforms = rng.random((B, max_new_tokens))
    text = np.full((B, length + max_new_tokens), stops.filler if pad_id is None else pad_id, np.int64)
    text[:, :length] = prompts.repeat(copies, axis=0)
    tokens = text[:, length:]
    logprobs = np.zeros((B, max_new_tokens), model.output_weight.dtype)
    mask = np.zeros((B, max_new_tokens), bool)
    running = np.ones(B, bool)
    steps = 0
    with no_grad():
        cache = model.new_cache(len(prompts), length + max_new_tokens - 1)
        logits = last_logits(model, prompts, cache)  # (B / copies, V)
        if copies > 1:
            cache.select(np.repeat(np.arange(len(prompts)), copies))
            logits = logits.repeat(copies, axis=0)  # (B, V)
        while True:
            drawn = law.draw(logits, text[:, : length + steps], uniforms[:, steps])
            tokens[running, steps] = drawn.ids[running]
            logprobs[running, steps] = drawn.logprobs[running]
            mask[:, steps] = running
            steps += 1
            running &= ~stops.ended(tokens[:, :steps])
            if on_token is not None:
                on_token(tokens[:, steps - 1])
            if steps == max_new_tokens or not running.any():
                break
            logits = last_logits(model, tokens[:, steps - 1 : steps], cache)
    return Generation(tokens[:, :steps], logprobs[:, :steps], mask[:, :steps], ~running)
