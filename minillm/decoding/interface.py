"""What decoding asks of a model, and the checks that every way of decoding shares."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor, is_recording, no_grad
from minillm.autograd.parallel import library_threads, parallel_map
from minillm.checks import require, require_positive
from minillm.nn.cache import KVCache

THREADED_TOKENS = 256  # from here on, threads gain more than it costs to wake them


@runtime_checkable
class LanguageModel(Protocol):
    """A model that reads ids and a cache: `Decoder`, `Transformer`, or anything with these four.

    ``hidden(ids, cache)`` reads new ids (B, L) and counts them in the cache; ``output_weight`` (V, d_model) turns the
    stream (B, L, d_model) into logits; ``config`` has ``vocab_size`` and ``context``.
    """

    config: Any

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head."""
        ...

    def hidden(self, ids: np.ndarray, cache: Any = None) -> Tensor:
        """The stream that the head reads."""
        ...

    def new_cache(self, batch: int, capacity: int | None = None) -> Any:
        """An empty cache."""
        ...


def writing_model(where: str, model: Any) -> LanguageModel:
    """A model, if it is one that continues a text; an encoder or an encoder-decoder is refused."""
    fits = isinstance(model, LanguageModel) and getattr(model.config, "architecture", "decoder") != "encoder"
    received = f"a {type(model).__name__}"
    require(fits, where, "the model", "one that continues a text (a decoder or a prefix decoder)", received)
    return model


def last_logits(model: LanguageModel, ids: Int[np.ndarray, "B L"], cache: Any) -> Float[np.ndarray, "B V"]:
    """Read new ids and return the logits after the last of them; no others are computed.

    Threads share the sequences of a batch of prompts, where the cache can be shared.
    """
    B, L = ids.shape
    threads = min(library_threads(), B) if isinstance(cache, KVCache) and L > 1 and B * L >= THREADED_TOKENS else 1
    edges = np.linspace(0, B, threads + 1).astype(int)
    rows = [slice(i, j) for i, j in pairwise(edges)]
    shares = [cache] if threads == 1 else [cache.rows(part) for part in rows]
    recording = is_recording()  # which is each thread's own affair

    def read(part: slice, share: Any) -> Tensor:
        if recording:
            return model.hidden(ids[part], share)
        with no_grad():
            return model.hidden(ids[part], share)

    ends = [hidden.data[:, -1] for hidden in parallel_map(read, rows, shares, threads=threads)]
    if threads > 1:
        cache.advance(L)
    return np.concatenate(ends) @ model.output_weight.data.T


def checked_prompts(where: str, prompts: Any) -> Int[np.ndarray, "B L"]:
    """Prompts as an array of integers (B, L), or an error."""
    hint = "Generate prompts of one length together; padding on the left is not supported."
    try:
        prompts = np.asarray(prompts)
    except ValueError:  # NumPy refuses lists of unequal length
        prompts = np.empty(0, object)
    fits = np.issubdtype(prompts.dtype, np.integer) and prompts.ndim == 2
    require(fits, where, "prompts", "integers of shape (B, L), all of one length", prompts, hint)
    require(prompts.size > 0, where, "prompts", "at least one token each", prompts)
    return prompts


def check_lengths(where: str, model: LanguageModel, length: int, max_new_tokens: int) -> None:
    """Refuse a request that the context cannot hold."""
    require_positive(max_new_tokens, where, "max_new_tokens", integer=True)
    context = model.config.context
    require(
        length + max_new_tokens - 1 <= context,
        where,
        "prompt and new tokens",
        f"at most {context + 1} together (the last token is never read; the model's context is {context})",
        f"{length} + {max_new_tokens}",
        "Shorten the prompt or ask for fewer tokens.",
    )


class Stops:
    r"""When an episode ends by itself: at one of some tokens, or behind one of some sequences of tokens.

    Equation: `stop-conditions` EOS sets ``terminated``; the maximal length without EOS is ``truncated``
    Raises: IndexError for a token outside the vocabulary, ValueError for an empty sequence.
    Source: notes §10.6.
    """

    def __init__(self, where: str, V: int, eos_id: int | Sequence[int] | None, stop: Sequence[Sequence[int]] = ()):
        self.eos = np.atleast_1d(np.array([] if eos_id is None else eos_id, np.int64))
        self.sequences = [np.array(sequence, np.int64) for sequence in stop]
        check_tokens(where, "eos_id", self.eos, V)
        for sequence in self.sequences:
            require(sequence.size > 0, where, "a stop sequence", "at least one token long", "an empty one")
            check_tokens(where, "a stop sequence", sequence, V)

    def ended(self, tokens: Int[np.ndarray, "B T"]) -> np.ndarray:
        """Which rows end here: (B,)."""
        ended = np.isin(tokens[:, -1], self.eos) if self.eos.size else np.zeros(len(tokens), bool)
        for sequence in self.sequences:
            if len(sequence) <= tokens.shape[1]:
                ended |= (tokens[:, -len(sequence) :] == sequence).all(-1)
        return ended

    @property
    def filler(self) -> int:
        """What stands behind the end, if nothing else is asked for."""
        return int(self.eos[0]) if self.eos.size else 0


def check_tokens(where: str, what: str, tokens: Any, V: int) -> None:
    """Refuse tokens outside the vocabulary."""
    for token in np.atleast_1d(tokens):
        require(0 <= token < V, where, what, f"in [0, {V})", int(token), error=IndexError)
