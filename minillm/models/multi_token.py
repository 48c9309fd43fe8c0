r"""Predicting several tokens at once, on top of a decoder: a chain of modules, or heads side by side.

Both read the trunk's stream and share its embedding and its output matrix. The trunk alone stays the ordinary model;
what is added here makes training look further ahead, and proposes tokens when text is generated.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor, cat, stack
from minillm.checks import require, require_positive
from minillm.functional.frozen import frozen
from minillm.functional.multi_token import mtp_loss
from minillm.fused.linear import linear
from minillm.fused.losses import cross_entropy
from minillm.fused.norms import add_rms_norm
from minillm.models.decoder import Block, Decoder, rotation
from minillm.nn.cache import KVCache
from minillm.nn.layers import RMSNorm
from minillm.nn.module import Module, parameter


class LookAhead(NamedTuple):
    """The next token's loss, and those of the tokens behind it, (D,)."""

    main: Float[Tensor, ""]
    depths: Float[Tensor, " D"]

    def total(self, coefficient: float = 0.3) -> Tensor:
        """What is minimised; see `mtp_loss`."""
        return mtp_loss(self.main, self.depths, coefficient)


class Head(Module):
    """A block of its own and the norm in front of the shared output matrix."""

    def __init__(self, trunk: Decoder, rng: np.random.Generator):
        config = trunk.config
        self.eps = config.norm_eps
        self.block = Block(config, rng)
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def through_block(self, x: Tensor, angles: np.ndarray, cache: KVCache | None = None) -> Tensor:
        """The block on a stream (B, L, d_model), appended to a cache of one layer if there is one."""
        block = self.block
        mixed = block.attention(block.attention_norm(x), angles, cache, 0)
        x, y = add_rms_norm(x, mixed, block.ffn_norm.gain, eps=self.eps)
        return x + block.ffn(y)

    def positions(self, n_new: int, cache: KVCache | None) -> np.ndarray:
        """Where the new positions stand."""
        return np.arange(n_new) if cache is None else cache.reserve(n_new)


class SequentialModule(Head):
    r"""One step further: joins the stream with the embedding of the next token, then a block.

    Equation: `mtp-sequential-module` $\mathbf h'^{\,i}_t=\mathbf W_i[\mathrm{RMSNorm}(\mathbf h^{i-1}_t);\mathrm{RMSNorm}(\mathrm{Emb}(x_{t+i}))]$, $\mathbf h^i=\mathrm{Block}_i(\mathbf h'^{\,i})$
    Shapes: h, e (B, L, d_model) -> (B, L, d_model)
    Source: deepseek (multi-token prediction); DeepSeek-V3 2024.
    """

    def __init__(self, trunk: Decoder, rng: np.random.Generator):
        super().__init__(trunk, rng)
        d = trunk.config.d_model
        self.norm_stream, self.norm_token = RMSNorm(d, self.eps), RMSNorm(d, self.eps)
        self.w_join = parameter(rng.normal(0.0, trunk.config.init_std, size=(d, 2 * d)))

    def forward(self, h: Tensor, e: Tensor, angles: np.ndarray, cache: KVCache | None = None) -> Tensor:
        """The stream one token further; ``angles`` (context, d_head / 2) are the trunk's."""
        angles = angles[self.positions(h.shape[1], cache)]
        joined = linear(cat([self.norm_stream(h), self.norm_token(e)], -1), self.w_join)
        out = self.through_block(joined, angles, cache)
        if cache is not None:
            cache.advance(h.shape[1])
        return out


class ParallelHead(Head):
    r"""A block that reads the trunk's stream and looks i tokens ahead, whatever comes in between.

    Equation: `mtp-parallel-heads` $f_i(\mathbf h_t)$
    Shapes: h (B, L, d_model) -> (B, L, d_model)
    Source: deepseek (multi-token prediction); Gloeckle et al. 2024.
    """

    def forward(self, h: Tensor, angles: np.ndarray, cache: KVCache | None = None) -> Tensor:
        """The head's own stream."""
        out = self.through_block(h, angles[self.positions(h.shape[1], cache)], cache)
        if cache is not None:
            cache.advance(h.shape[1])
        return out


def all_angles(trunk: Decoder) -> np.ndarray:
    """The rotary angles of every position of the trunk's context."""
    return rotation(trunk.config).angles


def _checked_text(where: str, ids: Any, depth: int) -> np.ndarray:
    ids = frozen(ids)
    wanted = f"of shape (B, L + 1) with L > {depth}, the depth"
    require(ids.ndim == 2 and ids.shape[1] > depth + 1, where, "the ids", wanted, ids)
    return ids


class SequentialPrediction(Module):
    r"""A trunk and D modules in a chain: module i predicts the token i + 1 places on.

    Equation: `mtp-sequential-module` $\mathbf h^0$ the trunk's stream, shared embedding and head; $\mathbf h^i_t$ predicts $x_{t+i+1}$
    Equation: `mtp-loss` $\mathcal L_{\rm main}+\frac{\lambda}{D}\sum_i\mathcal L^i$, ``losses(ids).total(lambda)``
    Shapes: ids (B, L + 1) -> losses; position t of module i exists for t < L - i
    Raises: ValueError for a depth that is not positive, or a text too short for it.
    Source: deepseek (multi-token prediction); DeepSeek-V3 2024.
    """

    def __init__(self, trunk: Decoder, depth: int, rng: np.random.Generator):
        require_positive(depth, "SequentialPrediction", "depth", integer=True)
        self.trunk, self.angles = trunk, all_angles(trunk)
        self.modules = [SequentialModule(trunk, rng) for _ in range(depth)]

    def losses(self, ids: Int[np.ndarray, "B L1"], batch: int | None = None) -> LookAhead:
        """The losses of a text; ``batch`` is the number of sequences when ``ids`` are only a share of them."""
        ids = _checked_text("SequentialPrediction", ids, len(self.modules))
        B, L = len(ids) if batch is None else batch, ids.shape[1] - 1
        weight = self.trunk.output_weight
        h = self.trunk.hidden(ids[:, :-1])  # (B, L, d_model)
        main = cross_entropy(linear(h, weight), ids[:, 1:], divisor=B * L)
        depths = []
        for i, module in enumerate(self.modules, start=1):
            h = module(h[:, :-1], self.trunk.embedding(ids[:, i:L]), self.angles)  # (B, L - i, d_model)
            logits = linear(module.norm(h), weight)
            depths.append(cross_entropy(logits, ids[:, i + 1 :], divisor=B * (L - i)))
        return LookAhead(main, stack(depths))


class ParallelPrediction(Module):
    r"""A trunk and heads for the tokens 2, ..., n places on; the trunk itself is the first of the n.

    Equation: `mtp-parallel-heads` $p(x_{t+i}\mid x_{\le t})=\mathrm{softmax}(\mathbf W_{\rm out}f_i(\mathbf h_t))$, $f_1$ the identity
    Equation: `mtp-loss` targets shifted by i
    Shapes: ids (B, L + 1) -> losses; head i has a target for t <= L - i
    Raises: ValueError for n below 2, or a text too short for it.
    Source: deepseek (multi-token prediction); Gloeckle et al. 2024.
    Differs: the first head is the trunk's own, so that the ordinary model needs nothing of what is added.
    """

    def __init__(self, trunk: Decoder, n: int, rng: np.random.Generator):
        fits = isinstance(n, int | np.integer) and n >= 2
        require(bool(fits), "ParallelPrediction", "n", "an integer of at least 2 (1 is the trunk alone)", n)
        self.trunk, self.angles = trunk, all_angles(trunk)
        self.heads = [ParallelHead(trunk, rng) for _ in range(n - 1)]

    def losses(self, ids: Int[np.ndarray, "B L1"], batch: int | None = None) -> LookAhead:
        """The losses of a text; ``batch`` is the number of sequences when ``ids`` are only a share of them."""
        ids = _checked_text("ParallelPrediction", ids, len(self.heads))
        B, L = len(ids) if batch is None else batch, ids.shape[1] - 1
        weight = self.trunk.output_weight
        h = self.trunk.hidden(ids[:, :-1])  # (B, L, d_model)
        main = cross_entropy(linear(h, weight), ids[:, 1:], divisor=B * L)
        depths = []
        for i, head in enumerate(self.heads, start=2):
            logits = linear(head.norm(head(h[:, : L + 1 - i], self.angles)), weight)  # (B, L + 1 - i, V)
            depths.append(cross_entropy(logits, ids[:, i:], divisor=B * (L + 1 - i)))
        return LookAhead(main, stack(depths))
