r"""Batched generation with a key/value cache."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.autograd import no_grad
from minillm.checks import require, require_positive
from minillm.decoding.samplers import sample
from minillm.models import Decoder


class Generation(NamedTuple):
    r"""What was generated, prompts left out.

    Equation: `stop-conditions` an episode ends with EOS (`terminated`) or at the maximal length (`truncated`)
    Shapes: tokens, logprobs, mask (B, T); terminated (B,)
    Source: notes §10.6.

    ``mask`` is true up to and including EOS. Behind it tokens are the padding and log-probabilities 0.
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
    model: Decoder,
    prompts: Int[np.ndarray, "B L"],
    max_new_tokens: int,
    rng: np.random.Generator,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    copies: int = 1,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> Generation:
    r"""Continue every prompt until EOS or for ``max_new_tokens`` tokens.

    Equation: `kv-cache` every position is computed once; logits equal those of full recomputation
    Equation: `stop-conditions` terminated by EOS or truncated at the maximal length
    Equation: `sample-behaviour-logprob` log-probabilities of the law that was sampled
    Shapes: prompts (B, L) -> tokens, logprobs, mask (B copies, T), terminated (B copies,); T <= max_new_tokens
    Raises: ValueError for prompts of unequal length, an empty prompt, a setting out of range, or when prompt and
        new tokens are longer than the model's context; IndexError for ids outside the vocabulary.
    Source: notes §4.3, §10.5.
    Differs: the cache keeps all positions while the context grows (erratum 43).

    ``copies`` continuations of a prompt lie next to each other and share the work of reading it. Temperature 0 is
    greedy. The random numbers of a row do not depend on what other rows do, nor on when they end. ``on_token`` is
    called with the ids (B copies,) of every step.
    """
    prompts = _checked_prompts(prompts)
    require_positive(max_new_tokens, "generate", "max_new_tokens", integer=True)
    require_positive(copies, "generate", "copies", integer=True)
    length, context = prompts.shape[1], model.config.context
    require(
        length + max_new_tokens - 1 <= context,
        "generate",
        "prompt and new tokens",
        f"at most {context + 1} together (the last token is never read; the model's context is {context})",
        f"{length} + {max_new_tokens}",
        "Shorten the prompt or ask for fewer tokens.",
    )
    for name, token in (("eos_id", eos_id), ("pad_id", pad_id)):
        inside = token is None or 0 <= token < model.config.vocab_size
        require(inside, "generate", name, f"in [0, {model.config.vocab_size})", token, error=IndexError)
    law = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    filler = pad_id if pad_id is not None else eos_id or 0

    B = len(prompts) * copies
    uniforms = rng.random((B, max_new_tokens))
    tokens = np.full((B, max_new_tokens), filler, np.int64)
    logprobs = np.zeros((B, max_new_tokens), model.embedding.weight.dtype)
    mask = np.zeros((B, max_new_tokens), bool)
    running = np.ones(B, bool)
    steps = 0
    with no_grad():
        cache = model.new_cache(len(prompts), length + max_new_tokens - 1)
        logits = _last_logits(model, prompts, cache)  # (B / copies, V)
        if copies > 1:
            cache.select(np.repeat(np.arange(len(prompts)), copies))
            logits = logits.repeat(copies, axis=0)  # (B, V)
        while True:
            drawn = sample(logits, uniforms[:, steps], **law)
            tokens[running, steps] = drawn.ids[running]
            logprobs[running, steps] = drawn.logprobs[running]
            mask[:, steps] = running
            if eos_id is not None:
                running &= drawn.ids != eos_id
            steps += 1
            if on_token is not None:
                on_token(tokens[:, steps - 1])
            if steps == max_new_tokens or not running.any():
                break
            logits = _last_logits(model, tokens[:, steps - 1 : steps], cache)
    return Generation(tokens[:, :steps], logprobs[:, :steps], mask[:, :steps], ~running)


def _last_logits(model: Decoder, ids: np.ndarray, cache) -> np.ndarray:
    """Logits after the last position only: (B, V)."""
    return model.hidden(ids, cache).data[:, -1] @ model.output_weight.data.T


def _checked_prompts(prompts) -> np.ndarray:
    hint = "Generate prompts of one length together; padding on the left is not supported."
    try:
        prompts = np.asarray(prompts)
    except ValueError:  # NumPy refuses lists of unequal length
        prompts = np.empty(0, object)
    integers = np.issubdtype(prompts.dtype, np.integer)
    require(
        integers and prompts.ndim == 2,
        "generate",
        "prompts",
        "integers of shape (B, L), all of one length",
        prompts,
        hint,
    )
    require(prompts.size > 0, "generate", "prompts", "at least one token each", prompts)
    return prompts
