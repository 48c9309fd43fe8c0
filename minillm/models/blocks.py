r"""The block that all models are made of, and the table from names to the modules in it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.functional.dropout import draw_kept, droppath
from minillm.models.config import Config
from minillm.nn.cross_cache import BlockCache
from minillm.nn.dropout import Dropout
from minillm.nn.experts import MixtureOfExperts
from minillm.nn.ffn import FeedForward
from minillm.nn.latent_attention import LatentAttention
from minillm.nn.linear_attention import LinearAttention
from minillm.nn.module import Module, parameter
from minillm.nn.multi_head import MultiHeadAttention
from minillm.nn.norms import make_norm
from minillm.nn.positions import NoPositions, ShawPositions
from minillm.nn.shaw_attention import ShawAttention


def spread_out(config: Config) -> float:
    """The initial spread of maps that write into the stream."""
    return config.init_std / float(np.sqrt(2 * config.n_layers))


def score_scale(config: Config) -> float | None:
    """What scores are multiplied by: None for one over the root of d_head."""
    return None if config.divide_scores else 1.0


def make_heads(config: Config, positions: NoPositions, causal: bool, rng: np.random.Generator) -> MultiHeadAttention:
    """Attention by heads: multi-head, grouped or multi-query, with or without a window."""
    shaw: dict[str, Any] = {"distance": positions.distance} if isinstance(positions, ShawPositions) else {}
    return (ShawAttention if shaw else MultiHeadAttention)(
        config.d_model,
        config.n_heads,
        rng,
        **shaw,
        n_kv_heads=config.n_kv_heads,
        d_head=config.d_head,
        causal=causal,
        window=config.window,
        scale=score_scale(config),
        bias=config.bias,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        turn=positions.turn if positions.turns else None,
        dropout=config.attention_dropout,
        std=config.init_std,
        std_out=spread_out(config),
    )


def make_latent(config: Config, positions: NoPositions, causal: bool, rng: np.random.Generator) -> LatentAttention:
    """DeepSeek's latent attention, which turns a part of its own whatever the positions are."""
    return LatentAttention(
        config.d_model,
        config.n_heads,
        config.d_head,
        config.d_latent or max(1, config.d_model // 2),
        config.d_rotary or 2 * max(1, config.d_head // 4),
        rng,
        d_q=config.d_latent_q,
        d_v=config.d_value,
        rope_base=config.rope_base,
        pairing=config.rope_pairing,
        norm_eps=config.norm_eps,
        std=config.init_std,
        std_out=spread_out(config),
    )


def make_linear(config: Config, positions: NoPositions, causal: bool, rng: np.random.Generator) -> LinearAttention:
    """Linear attention, a running sum in place of a cache."""
    return LinearAttention(
        config.d_model, config.n_heads, rng, causal=causal, std=config.init_std, std_out=spread_out(config)
    )


MIXERS: dict[str, Callable[..., Module]] = {"heads": make_heads, "latent": make_latent, "linear": make_linear}


def make_feed_forward(config: Config, rng: np.random.Generator, dense: bool = False) -> Module:
    """The feed-forward network by its name, or a mixture of experts; ``dense``: a block in front of those with experts."""
    d_ff, std, std_out = config.d_ff or 0, config.init_std, spread_out(config)
    if dense:
        return FeedForward(config.d_model, config.d_ff_dense or d_ff, "swiglu", rng, std=std, std_out=std_out)
    if config.ffn != "experts":
        return FeedForward(config.d_model, d_ff, config.ffn, rng, bias=config.bias, std=std, std_out=std_out)
    return MixtureOfExperts(
        config.d_model,
        d_ff,
        config.n_experts,
        config.experts_per_token,
        rng,
        router=config.router,
        n_shared=config.n_shared_experts,
        n_groups=config.n_expert_groups,
        k_groups=config.expert_groups_per_token,
        capacity_factor=config.capacity_factor,
        scale=config.expert_scale,
        std=std,
        std_out=std_out,
    )


class TransformerBlock(Module):
    r"""Attention and feed-forward network around a residual stream, in each of the usual arrangements.

    Equation: `block-pre-ln` the norm in front of each branch
    Equation: `block-post-ln` the norm behind each addition
    Equation: `block-parallel` both branches read one normalised stream
    Equation: `block-parallel-scaled` ``branches="halved"``: their sum over $\sqrt2$
    Equation: `branch-scales` ``branches="learnt"``: a learnt weight for each
    Equation: `decoder-block-cross` ``cross=True``: attention to a memory between the two
    Equation: `droppath` a branch is left out for some sequences, where a generator is given
    Equation: `dropout` entries of a branch are left out, where a generator is given
    Shapes: x (B, L, d_model), memory (B, S, d_model) -> (B, L, d_model)
    Source: notes §8, §8.9.
    """

    def __init__(
        self,
        config: Config,
        positions: NoPositions,
        rng: np.random.Generator,
        *,
        causal: bool,
        cross: bool = False,
        dense: bool = False,
    ):
        self.pre, self.parallel = config.norm_place == "pre", config.layout == "parallel"
        self.halved, self.droppath = config.branches == "halved", config.droppath
        self.dropout, self.drops_weights = Dropout(config.dropout), config.attention_dropout > 0
        self.attention_norm = make_norm(config.norm, config.d_model, config.norm_eps)
        self.attention: Any = MIXERS[config.attention](config, positions, causal, rng)
        self.cross_norm = make_norm(config.norm, config.d_model, config.norm_eps) if cross else None
        self.cross = make_heads(config, NoPositions(), False, rng) if cross else None
        self.ffn_norm = None if self.parallel else make_norm(config.norm, config.d_model, config.norm_eps)
        self.ffn = make_feed_forward(config, rng, dense)
        learnt = config.branches == "learnt"
        self.attention_gain = parameter(np.full(1, config.branch_init)) if learnt else None
        self.cross_gain = parameter(np.full(1, config.branch_init)) if learnt and cross else None
        self.ffn_gain = parameter(np.full(1, config.branch_init)) if learnt else None

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        keep: np.ndarray | None = None,
        memory_keep: np.ndarray | None = None,
        bias: Any = None,
        positions: np.ndarray | None = None,
        cache: Any = None,
        record: list | None = None,
        rng: np.random.Generator | None = None,
    ) -> Tensor:
        own, crossed = (cache.attention, cache.cross) if isinstance(cache, BlockCache) else (cache, None)

        chance = {"rng": rng} if self.drops_weights else {}

        def attend(y: Tensor) -> Tensor:
            return self.attention(y, keep=keep, bias=bias, positions=positions, cache=own, **chance)

        def look(y: Tensor) -> Tensor:
            assert self.cross is not None
            return self.cross(y, memory=memory, keep=memory_keep, cache=crossed, **chance)

        if self.parallel:
            y = self.attention_norm(x)
            a, f = weigh(attend(y), self.attention_gain), weigh(self._feed(y, record, rng), self.ffn_gain)
            if self.halved:
                a, f = a * float(np.sqrt(0.5)), f * float(np.sqrt(0.5))
            return self._add(self._add(x, a, rng), f, rng)
        x = self._around(x, self.attention_norm, attend, self.attention_gain, rng)
        if self.cross is not None:
            x = self._around(x, self.cross_norm, look, self.cross_gain, rng)
        return self._around(x, self.ffn_norm, lambda y: self._feed(y, record, rng), self.ffn_gain, rng)

    def _around(self, x: Tensor, norm: Any, branch: Callable[[Tensor], Tensor], gain: Tensor | None, rng) -> Tensor:
        """One branch with its norm and its addition."""
        if self.pre:
            return self._add(x, weigh(branch(norm(x)), gain), rng)
        return norm(self._add(x, weigh(branch(x), gain), rng))

    def _feed(self, y: Tensor, record: list | None, rng: np.random.Generator | None) -> Tensor:
        return self.ffn(y, record, rng) if isinstance(self.ffn, MixtureOfExperts) else self.ffn(y)

    def _add(self, x: Tensor, branch: Tensor, rng: np.random.Generator | None) -> Tensor:
        kept = None if rng is None or not self.droppath else draw_kept((x.shape[0],), self.droppath, rng)
        return droppath(x, self.dropout(branch, rng), kept, self.droppath)

    def new_cache(self, batch: int, capacity: int, dtype: Any = np.float32) -> Any:
        """An empty cache of this block."""
        own = self.attention.new_cache(batch, capacity, dtype)
        return own if self.cross is None else BlockCache(own)


def weigh(branch: Tensor, gain: Tensor | None) -> Tensor:
    """A branch times its learnt weight, if it has one."""
    return branch if gain is None else branch * gain
