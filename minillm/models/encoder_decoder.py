r"""Encoder and decoder: the source is read once, the target attends to it.

source -> encoder -> memory
target -> decoder blocks (masked self-attention, attention to the memory, FFN) -> head -> logits
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.autograd import Tensor
from minillm.checks import require
from minillm.fused.linear import linear
from minillm.models.config import Config
from minillm.models.stack import Stack, checked_ids, real_keys
from minillm.models.transformer import checked_capacity
from minillm.nn.cache import ModelCache
from minillm.nn.layers import Embedding, Linear
from minillm.nn.module import Module


class EncoderDecoder(Module):
    r"""A model from sequences to sequences; both sides share the embedding.

    Equation: `seq2seq-model` encoder once; decoder once in training, step by step in generation
    Equation: `encoder-stack` $\mathbf E_{\rm mem}=\mathbf H^{N_{\rm enc}}$, (B, L_enc, d)
    Equation: `decoder-block-cross` self-attention, cross-attention, FFN
    Equation: `kv-cache-prefix` the memory's keys and values are projected once and cached
    Shapes: source (B, L_enc), target (B, L_dec) -> logits (B, L_dec, V)
    Raises: ValueError for another architecture, ids that are not (B, L) or too long, or masks of other shapes.
    Source: notes §8, §8.3.
    """

    def __init__(self, config: Config, rng: np.random.Generator):
        where, fits = "EncoderDecoder", config.architecture == "encoder-decoder"
        require(fits, where, "the architecture", "'encoder-decoder'", config.architecture, "Use `Transformer`.")
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, rng, config.init_std)
        n_encoder = config.n_layers if config.n_encoder_layers is None else config.n_encoder_layers
        self.encoder = Stack(config, rng, n_layers=n_encoder, causal=False, bidirectional=True)
        self.decoder = Stack(config, rng, n_layers=config.n_layers, causal=True, cross=True)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, rng, config.init_std)

    def encode(
        self, source: Int[np.ndarray, "B S"], real: Bool[np.ndarray, "B S"] | None = None, **options: Any
    ) -> Float[Tensor, "B S d_model"]:
        """What the decoder attends to: (B, L_enc) -> (B, L_enc, d_model)."""
        ids = checked_ids("EncoderDecoder", source, self.config.context)
        keep = real_keys("EncoderDecoder", real, ids)
        return self.encoder(self.embedding(ids), np.arange(ids.shape[1]), keep=keep, **options)

    def decode(
        self,
        target: Int[np.ndarray, "B L"],
        memory: Float[Tensor, "B S d_model"],
        cache: ModelCache | None = None,
        real: Bool[np.ndarray, "B S"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "B L V"]:
        """Logits of the next target token after every position; ``real`` is the source's mask."""
        return linear(self.decode_hidden(target, memory, cache, real, **options), self.output_weight)  # (B, L, V)

    def decode_hidden(
        self,
        target: Int[np.ndarray, "B L"],
        memory: Float[Tensor, "B S d_model"],
        cache: ModelCache | None = None,
        real: Bool[np.ndarray, "B S"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "B L d_model"]:
        """The stream of the decoder that the head reads."""
        ids = checked_ids("EncoderDecoder", target, self.config.context)
        require(len(ids) == memory.shape[0], "EncoderDecoder", "the batch", f"the memory's, {memory.shape[0]}", ids)
        memory_keep = real_keys("EncoderDecoder", real, np.empty(memory.shape[:2]))
        positions = np.arange(ids.shape[1]) if cache is None else cache.reserve(ids.shape[1])
        x = self.decoder(self.embedding(ids), positions, cache=cache, memory=memory, memory_keep=memory_keep, **options)
        return x * float(self.config.d_model**-0.5) if self.config.scaled_head else x

    def forward(
        self,
        source: Int[np.ndarray, "B S"],
        target: Int[np.ndarray, "B L"],
        real: Bool[np.ndarray, "B S"] | None = None,
        **options: Any,
    ) -> Float[Tensor, "B L V"]:
        """Teacher forcing: logits for a target that stands one place to the right (`shift_right`)."""
        return self.decode(target, self.encode(source, real, **options), real=real, **options)

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head, (V, d_model): its own, or the embedding's."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, batch: int, capacity: int | None = None) -> ModelCache:
        """An empty cache: the decoder's own positions, and the memory once it has been seen."""
        return self.decoder.new_cache(batch, checked_capacity("EncoderDecoder", capacity, self.config.context))
