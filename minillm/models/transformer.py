r"""A transformer of one stack, with every choice of `Config`: decoder, prefix decoder or encoder.

    tokens -> embedding (+ positions, + segments) -> N blocks -> norm -> head -> logits

`Decoder` is the fast path for LLaMA; this is the readable general one.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from minillm.autograd import Tensor
from minillm.checks import require
from minillm.fused.linear import linear
from minillm.models.config import Config
from minillm.models.stack import Stack, checked_ids, prefix_keep, real_keys
from minillm.nn.cache import ModelCache
from minillm.nn.layers import Embedding, Linear
from minillm.nn.module import Module


class Transformer(Module):
    r"""One stack of blocks and a head over the vocabulary.

    Equation: `decoder-only-model` $P(\text{next}\mid\text{previous})$, causal, no cross-attention
    Equation: `encoder-only-model` ``architecture="encoder"``: full mask, contextual vectors
    Equation: `prefix-decoder-model` ``architecture="prefix"``: the prefix sees all of itself, what follows is causal
    Equation: `single-type-failure` an encoder sees the token it should predict; a decoder is blind to what follows
    Equation: `final-ln` pre-norm models normalise the stream once more before the head
    Shapes: ids (B, L) -> logits (B, L, V)
    Raises: ValueError for ids that are not (B, L) or longer than the context, a prefix that is longer than the text, a
        prefix or segments that the model does not have; IndexError for ids outside [0, V).
    Source: notes §8.1 to §8.4; bridging §1.
    Differs: the prefix is the whole source text (erratum 35); logits at position t score token t + 1 (erratum 8).
    """

    def __init__(self, config: Config, rng: np.random.Generator):
        where, hint = "Transformer", "Use `EncoderDecoder`."
        fits = config.architecture != "encoder-decoder"
        require(fits, where, "the architecture", "'decoder', 'prefix' or 'encoder'", config.architecture, hint)
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, rng, config.init_std)
        causal, both = config.architecture == "decoder", config.architecture == "encoder"
        self.stack = Stack(config, rng, n_layers=config.n_layers, causal=causal, bidirectional=both)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, rng, config.init_std)

    def forward(self, ids: Int[np.ndarray, "B L"], cache: ModelCache | None = None, **options: Any) -> Tensor:
        """Logits over the vocabulary at every position; the options are those of `hidden`."""
        return linear(self.hidden(ids, cache, **options), self.output_weight)  # (B, L, V)

    def hidden(
        self,
        ids: Int[np.ndarray, "B L"],
        cache: ModelCache | None = None,
        *,
        prefix: Any = None,
        real: Bool[np.ndarray, "B L"] | None = None,
        segments: Int[np.ndarray, "B L"] | None = None,
        record: list | None = None,
        rng: np.random.Generator | None = None,
    ) -> Tensor:
        """The stream that the head reads, (B, L, d_model).

        ``prefix`` is its length, one number or (B,); left out, there is none without a cache, and with an empty one
        the prompt is the prefix. ``real`` marks tokens that are not padding, ``record`` collects the routing of
        experts, ``rng`` switches on what happens in training only.
        """
        config, where = self.config, "Transformer"
        ids = checked_ids(where, ids, config.context)
        require(prefix is None or config.architecture == "prefix", where, "the prefix", "None here", prefix)
        require(segments is None or config.n_segments > 0, where, "the segments", "None here", segments)
        require(cache is None or config.architecture != "encoder", where, "the cache", "None in an encoder", cache)
        require(cache is None or cache.batch == len(ids), where, "the batch", "the cache's", ids)
        positions = np.arange(ids.shape[1]) if cache is None else cache.reserve(ids.shape[1])
        keep = real_keys(where, real, ids) if cache is None else None
        require(real is None or cache is None, where, "real", "None with a cache (give texts of one length)", real)
        if config.architecture == "prefix":
            start, L = int(positions[0]), ids.shape[1]
            prefix = (L if cache is not None and start == 0 else 0) if prefix is None else prefix
            allowed = prefix_keep(where, prefix, start, L)
            allowed = allowed[:, None] if allowed.ndim == 3 else allowed  # (B, 1, L, S)
            keep = allowed if keep is None else keep & allowed
        x = self.stack(
            self.embedding(ids), positions, cache=cache, segments=segments, keep=keep, record=record, rng=rng
        )
        return x * float(config.d_model**-0.5) if config.scaled_head else x

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head, (V, d_model): its own, or the embedding's."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, batch: int, capacity: int | None = None) -> ModelCache:
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens."""
        return self.stack.new_cache(batch, checked_capacity("Transformer", capacity, self.config.context))


def checked_capacity(where: str, capacity: int | None, context: int) -> int:
    """A cache's capacity: the context unless fewer positions are asked for."""
    capacity = context if capacity is None else capacity
    wanted = f"in 1..{context}, the context"
    require(0 < capacity <= context, f"{where}.new_cache", "the capacity", wanted, capacity)
    return capacity
