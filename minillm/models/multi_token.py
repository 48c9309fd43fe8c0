r"""Predicting several tokens at once, on top of a decoder: a chain of modules, or heads side by side.

Both read the trunk's stream and share its embedding and its output matrix; the trunk is a `Decoder` or any `Transformer`
that is a decoder, and what is added has blocks of its kind. The trunk alone stays the ordinary model;
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
from minillm.models.blocks import TransformerBlock
from minillm.models.decoder import Block, Decoder, rotation
from minillm.models.transformer import Transformer
from minillm.nn.cache import KVCache
from minillm.nn.layers import RMSNorm
from minillm.nn.module import Module, parameter
from minillm.nn.norms import make_norm


class LookAhead(NamedTuple):
    """The next token's loss, and those of the tokens behind it, (D,)."""

    main: Float[Tensor, ""]
    depths: Float[Tensor, " D"]

    def total(self, coefficient: float = 0.3) -> Tensor:
        """What is minimised; see `mtp_loss`."""
        return mtp_loss(self.main, self.depths, coefficient)


Trunk = Decoder | Transformer


class Head(Module):
    """A block of its own, of the trunk's kind, and the norm in front of the shared output matrix."""

    def __init__(self, trunk: Trunk, rng: np.random.Generator):
        config = trunk.config
        self.config, self.eps = config, config.norm_eps
        self.factor = float(config.d_model**-0.5) if config.scaled_head else 1.0
        if isinstance(trunk, Decoder):
            self.block: Any = Block(config, rng)
            self.angles = rotation(config).angles  # (context, d_head / 2)
        else:
            self.block = TransformerBlock(config, trunk.stack.positions, rng, causal=True)
            self.bias = trunk.stack.positions.bias  # a function: the trunk's own table, if there is one
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps)

    def through_block(self, x: Tensor, cache: Any = None, **options: Any) -> Tensor:
        """The block on a stream (B, L, d_model), appended to a cache of one layer if there is one."""
        block, start = self.block, 0 if cache is None else cache.length
        positions = np.arange(start, start + x.shape[1])
        if isinstance(block, TransformerBlock):
            bias = self.bias(positions, np.arange(start + x.shape[1]))
            return block(x, positions=positions, bias=bias, cache=cache, **options)
        if cache is not None:
            cache.reserve(x.shape[1])
        mixed = block.attention(block.attention_norm(x), self.angles[positions], cache, 0)
        if cache is not None:
            cache.advance(x.shape[1])
        x, y = add_rms_norm(x, mixed, block.ffn_norm.gain, eps=self.eps)
        return x + block.ffn(y)

    def out(self, h: Tensor) -> Tensor:
        """What the output matrix reads."""
        return self.norm(h) if self.factor == 1.0 else self.norm(h) * self.factor

    def new_cache(self, dtype: Any = np.float32) -> Any:
        """An empty cache of this block, for one sequence as long as the context."""
        c = self.config
        if isinstance(self.block, TransformerBlock):
            return self.block.new_cache(1, c.context, dtype)
        return KVCache(1, 1, c.n_kv_heads or c.n_heads, c.context, c.d_head, dtype)


class SequentialModule(Head):
    r"""One step further: joins the stream with the embedding of the next token, then a block.

    Equation: `mtp-sequential-module` $\mathbf h'^{\,i}_t=\mathbf W_i[\mathrm{RMSNorm}(\mathbf h^{i-1}_t);\mathrm{RMSNorm}(\mathrm{Emb}(x_{t+i}))]$, $\mathbf h^i=\mathrm{Block}_i(\mathbf h'^{\,i})$
    Shapes: h, e (B, L, d_model) -> (B, L, d_model)
    Source: deepseek (multi-token prediction); DeepSeek-V3 2024.
    """

    def __init__(self, trunk: Trunk, rng: np.random.Generator):
        super().__init__(trunk, rng)
        d = trunk.config.d_model
        self.norm_stream, self.norm_token = RMSNorm(d, self.eps), RMSNorm(d, self.eps)
        self.w_join = parameter(rng.normal(0.0, trunk.config.init_std, size=(d, 2 * d)))

    def forward(self, h: Tensor, e: Tensor, cache: Any = None, **options: Any) -> Tensor:
        """The stream one token further."""
        joined = linear(cat([self.norm_stream(h), self.norm_token(e)], -1), self.w_join)
        return self.through_block(joined, cache, **options)


class ParallelHead(Head):
    r"""A block that reads the trunk's stream and looks i tokens ahead, whatever comes in between.

    Equation: `mtp-parallel-heads` $f_i(\mathbf h_t)$
    Shapes: h (B, L, d_model) -> (B, L, d_model)
    Source: deepseek (multi-token prediction); Gloeckle et al. 2024.
    """

    def forward(self, h: Tensor, cache: Any = None, **options: Any) -> Tensor:
        """The head's own stream."""
        return self.through_block(h, cache, **options)


def check_trunk(where: str, trunk: Any) -> None:
    """Refuse a trunk that is not a decoder: what follows a token must be unknown to it."""
    fits = isinstance(trunk, Decoder | Transformer) and trunk.config.architecture == "decoder"
    received = f"a {type(trunk).__name__} with architecture '{getattr(trunk.config, 'architecture', None)}'"
    require(fits, where, "the trunk", "a decoder (other models see what they should predict)", received)


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
    Raises: ValueError for a trunk that is no decoder, a depth that is not positive, or a text too short for it.
    Source: deepseek (multi-token prediction); DeepSeek-V3 2024.
    """

    def __init__(self, trunk: Trunk, depth: int, rng: np.random.Generator):
        require_positive(depth, "SequentialPrediction", "depth", integer=True)
        check_trunk("SequentialPrediction", trunk)
        self.trunk = trunk
        self.modules = [SequentialModule(trunk, rng) for _ in range(depth)]

    def losses(self, ids: Int[np.ndarray, "B L1"], batch: int | None = None, **options: Any) -> LookAhead:
        """The losses of a text; ``batch`` is the number of sequences when ``ids`` are only a share of them.

        The options (``record``, ``rng``) go to every block of a `Transformer`.
        """
        ids = _checked_text("SequentialPrediction", ids, len(self.modules))
        B, L = len(ids) if batch is None else batch, ids.shape[1] - 1
        weight = self.trunk.output_weight
        h = self.trunk.hidden(ids[:, :-1], **options)  # (B, L, d_model)
        main = cross_entropy(linear(h, weight), ids[:, 1:], divisor=B * L)
        depths = []
        for i, module in enumerate(self.modules, start=1):
            h = module(h[:, :-1], self.trunk.embedding(ids[:, i:L]), **options)  # (B, L - i, d_model)
            logits = linear(module.out(h), weight)
            depths.append(cross_entropy(logits, ids[:, i + 1 :], divisor=B * (L - i)))
        return LookAhead(main, stack(depths))


class ParallelPrediction(Module):
    r"""A trunk and heads for the tokens 2, ..., n places on; the trunk itself is the first of the n.

    Equation: `mtp-parallel-heads` $p(x_{t+i}\mid x_{\le t})=\mathrm{softmax}(\mathbf W_{\rm out}f_i(\mathbf h_t))$, $f_1$ the identity
    Equation: `mtp-loss` targets shifted by i
    Shapes: ids (B, L + 1) -> losses; head i has a target for t <= L - i
    Raises: ValueError for a trunk that is no decoder, n below 2, or a text too short for it.
    Source: deepseek (multi-token prediction); Gloeckle et al. 2024.
    Differs: the first head is the trunk's own, so that the ordinary model needs nothing of what is added.
    """

    def __init__(self, trunk: Trunk, n: int, rng: np.random.Generator):
        fits = isinstance(n, int | np.integer) and n >= 2
        require(bool(fits), "ParallelPrediction", "n", "an integer of at least 2 (1 is the trunk alone)", n)
        check_trunk("ParallelPrediction", trunk)
        self.trunk = trunk
        self.heads = [ParallelHead(trunk, rng) for _ in range(n - 1)]

    def losses(self, ids: Int[np.ndarray, "B L1"], batch: int | None = None, **options: Any) -> LookAhead:
        """The losses of a text; ``batch`` is the number of sequences when ``ids`` are only a share of them.

        The options (``record``, ``rng``) go to every block of a `Transformer`.
        """
        ids = _checked_text("ParallelPrediction", ids, len(self.heads))
        B, L = len(ids) if batch is None else batch, ids.shape[1] - 1
        weight = self.trunk.output_weight
        h = self.trunk.hidden(ids[:, :-1], **options)  # (B, L, d_model)
        main = cross_entropy(linear(h, weight), ids[:, 1:], divisor=B * L)
        depths = []
        for i, head in enumerate(self.heads, start=2):
            logits = linear(head.out(head(h[:, : L + 1 - i], **options)), weight)  # (B, L + 1 - i, V)
            depths.append(cross_entropy(logits, ids[:, i:], divisor=B * (L + 1 - i)))
        return LookAhead(main, stack(depths))
