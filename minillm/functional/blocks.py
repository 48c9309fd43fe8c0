r"""Transformer blocks as written: what is normalised, what is added, and with what weight.

``attend`` and ``feed`` are the two branches, functions of a stream (B, L, d) to the same shape; ``g`` are gains of
RMSNorm.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require
from minillm.functional.norms import rms_norm

Branch = Callable[[Tensor], Tensor]


def _example_two(rng):
    shape = [(2, 3, 4), (1, 1, 3), (2, 1, 2)][rng.integers(3)]
    gains = (rng.normal(size=shape[-1]), rng.normal(size=shape[-1]))
    return (rng.normal(size=shape), lambda t: t * t, lambda t: t.tanh(), *gains), {}


def _example_one(rng):
    (x, attend, feed, g, _), _ = _example_two(rng)
    return (x, attend, feed, g), {}


def _example_gains(rng):
    (x, attend, feed, g), _ = _example_one(rng)
    return (x, attend, feed, g, np.array(rng.normal()), np.array(rng.normal())), {}


@written("pre_ln_block", example=_example_two)
def pre_ln_block(
    x: Float[Tensor, "B L d"],
    attend: Branch,
    feed: Branch,
    g_1: Float[Tensor, " d"],
    g_2: Float[Tensor, " d"],
    eps: float = 1e-6,
) -> Float[Tensor, "B L d"]:
    r"""Each branch reads the normalised stream and adds to the stream itself.

    Equation: `block-pre-ln` $\mathbf x\mathrel{+}=\mathrm{Attn}(\mathrm N(\mathbf x));\ \mathbf x\mathrel{+}=\mathrm{FFN}(\mathrm N(\mathbf x))$
    Shapes: x (B, L, d) -> (B, L, d)
    Raises: ValueError if a gain is not (d,).
    Source: notes §8 (figure); lecture06 (Transformer decoder).
    """
    x = x + attend(rms_norm(x, g_1, eps))
    return x + feed(rms_norm(x, g_2, eps))


@written("post_ln_block", example=_example_two)
def post_ln_block(
    x: Float[Tensor, "B L d"],
    attend: Branch,
    feed: Branch,
    g_1: Float[Tensor, " d"],
    g_2: Float[Tensor, " d"],
    eps: float = 1e-6,
) -> Float[Tensor, "B L d"]:
    r"""The sum of stream and branch is normalised.

    Equation: `block-post-ln` $\mathbf x=\mathrm N(\mathbf x+\mathrm{Attn}(\mathbf x));\ \mathbf x=\mathrm N(\mathbf x+\mathrm{FFN}(\mathbf x))$
    Shapes: x (B, L, d) -> (B, L, d)
    Raises: ValueError if a gain is not (d,).
    Source: notes §8 (figure).
    """
    x = rms_norm(x + attend(x), g_1, eps)
    return rms_norm(x + feed(x), g_2, eps)


@written("parallel_block", example=_example_one)
def parallel_block(
    x: Float[Tensor, "B L d"], attend: Branch, feed: Branch, g: Float[Tensor, " d"], eps: float = 1e-6
) -> Float[Tensor, "B L d"]:
    r"""Both branches read the same normalised stream; one addition.

    Equation: `block-parallel` $\mathbf x'=\mathbf x+\mathrm{Attn}(\mathrm N(\mathbf x))+\mathrm{FFN}(\mathrm N(\mathbf x))$
    Shapes: x (B, L, d) -> (B, L, d)
    Raises: ValueError if the gain is not (d,).
    Source: notes §8.9; Chowdhery et al. 2022.
    """
    y = rms_norm(x, g, eps)
    return x + attend(y) + feed(y)


@written("parallel_block_scaled", example=_example_one)
def parallel_block_scaled(
    x: Float[Tensor, "B L d"], attend: Branch, feed: Branch, g: Float[Tensor, " d"], eps: float = 1e-6
) -> Float[Tensor, "B L d"]:
    r"""The parallel block with the sum of its branches over the root of 2.

    Equation: `block-parallel-scaled` $\mathbf x'=\mathbf x+\frac1{\sqrt2}(a+f)$
    Shapes: x (B, L, d) -> (B, L, d)
    Raises: ValueError if the gain is not (d,).
    Source: notes §8.9.
    Differs: keeps the variance of independent branches only; at correlation c it is 1 + c (erratum 33).
    """
    y = rms_norm(x, g, eps)
    return x + (attend(y) + feed(y)) * float(1 / np.sqrt(2.0))


@written("parallel_block_gains", example=_example_gains)
def parallel_block_gains(
    x: Float[Tensor, "B L d"],
    attend: Branch,
    feed: Branch,
    g: Float[Tensor, " d"],
    alpha_attn: Float[Tensor, ""],
    alpha_ffn: Float[Tensor, ""],
    eps: float = 1e-6,
) -> Float[Tensor, "B L d"]:
    r"""The parallel block with a learnt weight for each branch; the identity where both are 0.

    Equation: `branch-scales` $\mathbf x'=\mathbf x+\alpha_{\rm attn}a+\alpha_{\rm ffn}f$
    Shapes: x (B, L, d), two numbers -> (B, L, d)
    Raises: ValueError if the gain is not (d,).
    Source: notes §8.9.
    """
    y = rms_norm(x, g, eps)
    return x + alpha_attn * attend(y) + alpha_ffn * feed(y)


@written(
    "decoder_block_cross",
    example=lambda rng: (
        (rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 1, 4)), lambda t: t * t, lambda t, m: t * m, lambda t: t.tanh(),
         *(rng.normal(size=4) for _ in range(3))), {},
    ),
)  # fmt: skip
def decoder_block_cross(
    x: Float[Tensor, "B L d"],
    memory: Float[Tensor, "B S d"],
    attend: Branch,
    cross: Callable[[Tensor, Tensor], Tensor],
    feed: Branch,
    g_1: Float[Tensor, " d"],
    g_2: Float[Tensor, " d"],
    g_3: Float[Tensor, " d"],
    eps: float = 1e-6,
) -> Float[Tensor, "B L d"]:
    r"""Masked self-attention, attention to the encoder's output, feed-forward network.

    Equation: `decoder-block-cross` masked self-attention, cross-attention ($\mathbf Q$ from the decoder, $\mathbf K,\mathbf V$ from $\mathbf E_{\rm mem}$), FFN
    Shapes: x (B, L_dec, d), memory (B, L_enc, d) -> (B, L_dec, d)
    Raises: ValueError if a gain is not (d,).
    Source: notes §8.
    """
    x = x + attend(rms_norm(x, g_1, eps))
    x = x + cross(rms_norm(x, g_2, eps), memory)
    return x + feed(rms_norm(x, g_3, eps))


def shift_right(y: Int[np.ndarray, "B L"], bos: int) -> Int[np.ndarray, "B L"]:
    r"""What a decoder reads to predict y: the same tokens one place to the right, behind a first one.

    Equation: `shift-right` $[\mathrm{BOS},y_1,\dots,y_{L-1}]$ predicts $y$
    Shapes: y (B, L) -> (B, L)
    Raises: ValueError unless y is (B, L) of integers with L >= 1.
    Source: notes §8.
    """
    y = np.asarray(y)
    fits = y.ndim == 2 and y.shape[1] > 0 and np.issubdtype(y.dtype, np.integer)
    require(fits, "shift_right", "the targets", "integers of shape (B, L) with L >= 1", y)
    return np.concatenate([np.full((len(y), 1), bos, y.dtype), y[:, :-1]], axis=1)
