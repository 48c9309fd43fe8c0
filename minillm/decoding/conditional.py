r"""Generation given another text: an encoder-decoder with its source, as a model that continues what it has written."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Int

from minillm.autograd import Tensor, no_grad
from minillm.checks import require
from minillm.decoding.interface import LanguageModel, writing_model
from minillm.models import EncoderDecoder
from minillm.nn.cache import ModelCache


class Conditioned:
    r"""An encoder-decoder that has read its source.

    Equation: `seq2seq-model` encoder once; decoder step by step
    Equation: `kv-cache-prefix` the memory's keys and values are projected when the first token is read, and cached
    Shapes: source (B, S); ids (B', L) of the same sequences, or of copies that the cache has selected
    Raises: ValueError for a source that is not (B, S) or longer than the context.
    Source: notes §8.3, §8.4.
    """

    def __init__(self, model: EncoderDecoder, source: Int[np.ndarray, "B S"]):
        self.model = model
        c = model.config
        self.config = SimpleNamespace(vocab_size=c.vocab_size, context=c.context, architecture="decoder")
        with no_grad():
            self.memory = model.encode(source)

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head."""
        return self.model.output_weight

    def hidden(self, ids: Int[np.ndarray, "B L"], cache: Any = None) -> Tensor:
        """The stream that the head reads."""
        memory = self.memory
        if len(ids) != len(memory):
            # Copies of sequences: the cache holds what is read of the memory, and only its shape is looked at.
            read = cache is not None and cache.length > 0
            require(read, "Conditioned", "the batch", f"the source's, {len(memory)}", ids)
            memory = Tensor(np.broadcast_to(memory.data[:1], (len(ids), *memory.shape[1:])))
        return self.model.decode_hidden(ids, memory, cache)

    def new_cache(self, batch: int, capacity: int | None = None) -> ModelCache:
        """An empty cache."""
        return self.model.new_cache(batch, capacity)


def writer(where: str, model: Any, ids: Int[np.ndarray, " L"], start: int | None = None) -> tuple[LanguageModel, Any]:
    """What continues a text, and the prompt (1, L') that it begins with.

    For a decoder that is the text itself. An encoder-decoder reads the text as its source, and begins with ``start``,
    or as `minillm.training.objectives.SecondHalf` trains it, with the last token of the source.

    Raises: ValueError for an encoder, which writes nothing, or a source that is longer than the context.
    """
    if isinstance(model, EncoderDecoder):
        first = ids[-1:] if start is None else np.array([start])
        return Conditioned(model, ids[None]), first[None]
    return writing_model(where, model), ids[None]
