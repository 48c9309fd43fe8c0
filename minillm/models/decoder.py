r"""A LLaMA-style decoder, read from top to bottom.

    tokens -> embedding -> N x [ + attention(norm) , + SwiGLU(norm) ] -> norm -> head -> logits

Pre-norm residual blocks with RMSNorm, rotary positions, causal attention with optionally grouped keys and values,
a gated feed-forward network, no biases, and an output matrix of its own or shared with the embedding.
"""

from typing import Any

import numpy as np

from minillm.autograd import Tensor, is_recording
from minillm.checks import require
from minillm.functional.linear import check_ids
from minillm.functional.rope_scaling import Rotation, scaled_rotation
from minillm.fused.linear import linear
from minillm.fused.norms import add_rms_norm
from minillm.models.config import Config
from minillm.models.one_token import one_token
from minillm.nn import CausalSelfAttention, Embedding, KVCache, Linear, Module, RMSNorm, SwiGLU


class Block(Module):
    r"""Attention and feed-forward network, each behind its norm.

    Equation: `pre-ln` $\mathbf x\leftarrow\mathbf x+F(\mathrm{RMSNorm}(\mathbf x))$ for attention, then for the FFN
    """

    def __init__(self, config: Config, rng: np.random.Generator):
        std, std_out = config.init_std, config.init_std / np.sqrt(2 * config.n_layers)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        n_kv_heads, scale = config.n_kv_heads or config.n_heads, score_scale(config)
        self.attention = CausalSelfAttention(
            config.d_model, config.n_heads, n_kv_heads, config.rope_pairing, rng, std, std_out, scale
        )
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.d_ff or 0, rng, std, std_out)


def rotation(config: Config) -> Rotation:
    """The angles of all positions of the context, (context, d_head / 2), and what turned vectors are multiplied by."""
    return scaled_rotation(np.arange(config.context), config.d_head, config.rope_base, config.rope_scaling)


def score_scale(config: Config) -> float:
    """What scores are multiplied by: YaRN's magnitude, of queries and of keys, over the root of d_head."""
    magnitude = scaled_rotation(np.zeros(1), config.d_head, config.rope_base, config.rope_scaling).magnitude
    return magnitude**2 / float(np.sqrt(config.d_head))


class Decoder(Module):
    r"""The language model: a distribution over the next token at every position.

    Equation: `lm-head` $\mathrm{logits}=\mathbf H\mathbf W_{\rm out}$
    Equation: `next-token-distribution` the softmax of the logits at position t is the law of token t + 1
    Equation: `weight-tying` tied: $\mathbf W_{\rm out}=\mathbf W_{\rm emb}^\top$
    Equation: `final-ln` $\mathbf h=\mathrm{RMSNorm}(\mathbf x^{(N_{\rm layer})})$ before the head
    Equation: `init-schemes` std ``init_std``; residual output maps times $1/\sqrt{2N_{\rm layer}}$
    Shapes: ids (B, L) -> logits (B, L, V)
    Raises: ValueError for ids that are not (B, L) or longer than the context, IndexError for ids outside [0, V).
    Source: bridging §1; lecture06 (the LLaMA slides); Touvron et al. 2023.
    Differs: logits at position t score token t + 1 (erratum 8).
    """

    def __init__(self, config: Config, rng: np.random.Generator):
        hint = "Use `Transformer`, which has every choice."
        require(config.is_llama, "Decoder", "the configuration", "that of a LLaMA", "other choices", hint)
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, rng, config.init_std)
        self.blocks = [Block(config, rng) for _ in range(config.n_layers)]
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, rng, config.init_std)
        self._angles = rotation(config).angles  # (context, d_head / 2)

    def forward(self, ids: np.ndarray, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token after every position; with a cache, ids are the positions that are new."""
        return linear(self.hidden(ids, cache), self.output_weight)  # (B, L, V)

    def hidden(self, ids: np.ndarray, cache: KVCache | None = None) -> Tensor:
        """The normalised stream that the head reads: (B, L) -> (B, L, d_model)."""
        positions = self._positions(ids, cache)
        if cache is not None and len(positions) == 1 and not is_recording():  # generation, a token at a time
            given = np.asarray(ids.data if isinstance(ids, Tensor) else ids)[:, 0]
            return Tensor(one_token(self, check_ids("Decoder", given, self.config.vocab_size), cache)[:, None])
        angles = self._angles[positions]  # (L, d_head / 2)

        # The norm of every branch is fused with the addition that precedes it, so the loop hands on the
        # stream and its normalised copy: x is what the branches write to, y is what they read.
        x = self.embedding(ids)  # (B, L, d_model)
        y = self.blocks[0].attention_norm(x)
        for i, block in enumerate(self.blocks):
            x, y = add_rms_norm(x, block.attention(y, angles, cache, i), block.ffn_norm.gain, eps=self.config.norm_eps)
            following = self.blocks[i + 1].attention_norm if i + 1 < len(self.blocks) else self.final_norm
            x, y = add_rms_norm(x, block.ffn(y), following.gain, eps=self.config.norm_eps)
        if cache is not None:
            cache.advance(len(positions))
        return y

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the head, (V, d_model): its own, or the embedding's."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty key/value cache for ``batch`` sequences of up to ``capacity`` tokens."""
        c = self.config
        capacity = c.context if capacity is None else capacity
        require(
            0 < capacity <= c.context, "Decoder.new_cache", "the capacity", f"in 1..{c.context}, the context", capacity
        )
        return KVCache(c.n_layers, batch, c.n_kv_heads or c.n_heads, capacity, c.d_head, self.embedding.weight.dtype)

    def _positions(self, given: Any, cache: KVCache | None) -> np.ndarray:
        ids = np.asarray(given.data if isinstance(given, Tensor) else given)
        require(ids.ndim == 2 and ids.shape[1] > 0, "Decoder", "the ids", "of shape (B, L) with L >= 1", ids)
        if cache is not None:
            require(cache.keys.shape[1] == len(ids), "Decoder", "the batch", f"the cache's, {cache.keys.shape[1]}", ids)
            return cache.reserve(ids.shape[1])
        require(
            ids.shape[1] <= self.config.context,
            "Decoder",
            "the text",
            f"at most {self.config.context} tokens long, the model's context",
            ids,
        )
        return np.arange(ids.shape[1])
