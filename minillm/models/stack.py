r"""Embedding, positions, blocks, final norm: what encoders and decoders have in common."""

from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require
from minillm.functional.masks import padding_mask, prefix_mask
from minillm.models.blocks import TransformerBlock
from minillm.models.config import Config
from minillm.nn.cache import ModelCache
from minillm.nn.dropout import Dropout
from minillm.nn.layers import Embedding
from minillm.nn.module import Module
from minillm.nn.norms import make_norm
from minillm.nn.positions import NoPositions, make_positions


def positions_for(config: Config, rng: np.random.Generator, bidirectional: bool) -> NoPositions:
    """The kind of positions that a configuration names."""
    return make_positions(
        config.positions,
        rng,
        context=config.context,
        d_model=config.d_model,
        n_heads=config.n_heads,
        d_head=config.d_head,
        rope_base=config.rope_base,
        rope_pairing=config.rope_pairing,
        rope_scaling=config.rope_scaling,
        bidirectional=bidirectional,
        shaw_distance=config.shaw_distance,
        std=config.init_std,
    )


class Stack(Module):
    r"""A stream of token vectors through a number of blocks.

    Equation: `encoder-stack` $\mathbf H^{k+1}=\mathrm{Enc}_k(\mathbf H^k),\ k=0,\dots,N_{\rm enc}-1$
    Shapes: x (B, L, d_model) -> (B, L, d_model)
    Raises: ValueError for a text that is longer than the context.
    Source: notes §8.
    Differs: blocks are counted from 0 and the memory is $\mathbf H^{N_{\rm enc}}$ (erratum 34).
    """

    def __init__(
        self,
        config: Config,
        rng: np.random.Generator,
        *,
        n_layers: int,
        causal: bool,
        bidirectional: bool = False,
        cross: bool = False,
    ):
        self.config = config
        self.positions = positions_for(config, rng, bidirectional)
        self.segments = (
            Embedding(config.n_segments, config.d_model, rng, config.init_std) if config.n_segments else None
        )
        self.embedding_norm = make_norm(config.norm, config.d_model, config.norm_eps) if config.embedding_norm else None
        self.blocks = [
            TransformerBlock(config, self.positions, rng, causal=causal, cross=cross, dense=i < config.n_dense_layers)
            for i in range(n_layers)
        ]
        self.dropout = Dropout(config.dropout)
        pre = config.norm_place == "pre"
        self.final_norm = make_norm(config.norm, config.d_model, config.norm_eps) if pre else None

    def forward(
        self,
        x: Tensor,
        positions: np.ndarray,
        *,
        cache: ModelCache | None = None,
        segments: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
        **through: Any,
    ) -> Tensor:
        x = self.positions.add(x, positions)
        if self.segments is not None:
            x = x + self.segments(np.zeros(x.shape[:2], np.int64) if segments is None else np.asarray(segments))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.dropout(x, rng)
        bias = self._bias(positions, cache)
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layer(i)
            x = block(x, positions=positions, bias=bias, cache=layer, rng=rng, **through)
        return x if self.final_norm is None else self.final_norm(x)

    def _bias(self, positions: np.ndarray, cache: ModelCache | None) -> Any:
        """What all layers add to their scores; a function where the cache decides which keys are seen, in which order."""
        if cache is not None and self.config.window is not None and self.positions.biases:
            return self.positions.bias
        return self.positions.bias(positions, np.arange(positions[-1] + 1 if cache is not None else len(positions)))

    def new_cache(self, batch: int, capacity: int, dtype: Any = np.float32) -> ModelCache:
        """An empty cache of every block."""
        return ModelCache([block.new_cache(batch, capacity, dtype) for block in self.blocks])


def checked_ids(where: str, ids: Any, context: int) -> np.ndarray:
    """Token ids as an array (B, L) that fits into the context."""
    ids = np.asarray(ids.data if isinstance(ids, Tensor) else ids)
    require(ids.ndim == 2 and ids.shape[1] > 0, where, "the ids", "of shape (B, L) with L >= 1", ids)
    require(ids.shape[1] <= context, where, "the text", f"at most {context} tokens long, the model's context", ids)
    return ids


def real_keys(where: str, real: Any, ids: np.ndarray) -> np.ndarray | None:
    """The mask (B, 1, 1, L) that hides padding, from one that is true for real tokens, (B, L)."""
    if real is None:
        return None
    real = np.asarray(real)
    fits = real.dtype == bool and real.shape == ids.shape
    require(fits, where, "the mask of real tokens", f"boolean of shape {ids.shape}", real)
    return padding_mask(real)


def prefix_keep(where: str, prefix: Any, start: int, L: int) -> np.ndarray:
    """What L new tokens behind ``start`` others may see, where a prefix sees all of itself: (L, S) or (B, 1, L, S)."""
    longest = int(np.max(prefix))
    require(
        start == 0 or longest <= start,
        where,
        "the prefix",
        f"read in one piece, at most {start} tokens of it are cached",
        prefix,
    )
    require(int(np.min(prefix)) >= 0 and longest <= start + L, where, "the prefix", f"in 0..{start + L}", prefix)
    return prefix_mask(start + L, prefix)[..., start:, :]
