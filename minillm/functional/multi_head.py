r"""Multi-head attention from its weights, as written; what heads cost, and how many of them can be made into few."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.attention import (
    attention_weights,
    check_attention,
    repeat_heads,
    scaled_dot_product_attention,
    scaled_scores,
)
from minillm.functional.linear_algebra import merge_heads, split_heads
from minillm.functional.masks import causal_mask


def _example(rng):
    d, d_x, H, H_kv, d_head = 4, 3, *[(2, 2, 2), (2, 1, 3), (1, 1, 1)][rng.integers(3)]
    arrays = [(2, 3, d), (2, 5, d_x), (H * d_head, d), (H_kv * d_head, d_x), (H_kv * d_head, d_x), (d, H * d_head)]
    return tuple(rng.normal(size=shape) for shape in arrays), {"H": H, "H_kv": H_kv}


@written("multi_head_attention", example=_example)
def multi_head_attention(
    z: Float[Tensor, "B L d_model"],
    x: Float[Tensor, "B S d_memory"],
    w_q: Float[Tensor, "d_q d_model"],
    w_k: Float[Tensor, "d_kv d_memory"],
    w_v: Float[Tensor, "d_kv d_memory"],
    w_out: Float[Tensor, "d_model d_q"],
    *,
    H: int,
    H_kv: int | None = None,
    keep: np.ndarray | None = None,
) -> Float[Tensor, "B L d_model"]:
    r"""Queries from one sequence, keys and values from another, or from the same.

    Equation: `cross-attention` $\mathbf Q=\mathbf Z\mathbf W_q,\ \mathbf K=\mathbf X\mathbf W_k,\ \mathbf V=\mathbf X\mathbf W_v$
    Equation: `self-attention` the same with $\mathbf Z=\mathbf X$
    Equation: `mha` $\mathrm{Concat}_h(\mathrm{softmax}(\mathbf S_h)\mathbf V_h)\mathbf W_O$
    Equation: `qkv-projection` one matrix for all heads; head h owns rows $[hd_{\rm head},(h+1)d_{\rm head})$
    Equation: `vision-text-cross` x may be of another modality, and of another width
    Shapes: z (B, L, d_model), x (B, S, d_memory), w_q (H d_head, d_model), w_k, w_v (H_kv d_head, d_memory),
        w_out (d_model, H d_head), keep broadcastable to (B, H, L, S) -> (B, L, d_model)
    Raises: ValueError if widths or heads do not belong together.
    Source: bridging §1.2; notes §4.1, §4.5 (9)-(11).
    """
    H_kv = H if H_kv is None else H_kv
    q, k, v = split_heads(z @ w_q.T, H), split_heads(x @ w_k.T, H_kv), split_heads(x @ w_v.T, H_kv)
    return merge_heads(scaled_dot_product_attention(q, k, v, keep)) @ w_out.T


def _example_dropout(rng):
    arrays = tuple(rng.normal(size=(2, 2, 3, 2)) for _ in range(3))
    dropped = [None, rng.random((2, 2, 3, 3)) < 0.4][rng.integers(2)]
    more = [{}, {"bias": rng.normal(size=(1, 3, 3)), "scale": 0.6}][rng.integers(2)]
    return arrays, {"keep": causal_mask(3), "rate": 0.4, "dropped": dropped, **more}


@written("attention_with_dropout", example=_example_dropout)
def attention_with_dropout(
    q: Float[Tensor, "B H L_q d"],
    k: Float[Tensor, "B H_kv L_k d"],
    v: Float[Tensor, "B H_kv L_k d_v"],
    keep: np.ndarray | None = None,
    *,
    rate: float,
    dropped: Bool[np.ndarray, "B H L_q L_k"] | None = None,
    bias: Any = None,
    scale: float | None = None,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""Attention that forgets some of its weights in training.

    Equation: `attention-dropout` $\mathrm{dropout}(\mathrm{softmax}(\mathbf S))\mathbf V$, survivors times $1/(1-p)$
    Shapes: q, k, v as in `scaled_dot_product_attention`; dropped (B, H, L_q, L_k), drawn by `draw_dropped`, or None to
        evaluate -> (B, H, L_q, d_v)
    Raises: ValueError for a rate outside [0, 1) or another shape of ``dropped``.
    Source: notes §4.8.
    """
    check_rate("attention_with_dropout", rate)
    times = check_attention(q, k, v)
    scores = scaled_scores(q, repeat_heads(k, times), scale)
    weights = attention_weights(scores if bias is None else scores + bias, keep)
    if dropped is not None:
        fits = dropped.shape == weights.shape and dropped.dtype == bool
        require(fits, "attention_with_dropout", "dropped", f"boolean of shape {weights.shape}", dropped)
        weights = weights * (~dropped * (1.0 / (1.0 - rate)))
    return weights @ repeat_heads(v, times)


def draw_dropped(shape: tuple[int, ...], rate: float, rng: np.random.Generator) -> Bool[np.ndarray, "..."]:
    """Which entries to drop, each with probability ``rate``.

    Equation: `attention-dropout` each weight is dropped with probability p
    Shapes: -> shape, true where dropped
    Raises: ValueError for a rate outside [0, 1).
    Source: notes §4.8.
    """
    check_rate("draw_dropped", rate)
    return rng.random(shape) < rate


def check_rate(where: str, rate: float) -> None:
    """Refuse a rate that is not in [0, 1)."""
    require(isinstance(rate, int | float) and 0 <= rate < 1, where, "the rate", "in [0, 1)", rate)


def pool_heads(w: Float[np.ndarray, "H_d_head d_model"], H: int, H_kv: int) -> Float[np.ndarray, "H_kv_d_head d_model"]:
    r"""Fewer key or value heads from many: the mean over each group.

    Equation: `mha-to-gqa` $\mathbf K_g=\frac1{|g|}\sum_{h\in g}\mathbf K_h$, on the weights
    Shapes: w (H d_head, d_model) -> (H_kv d_head, d_model)
    Raises: ValueError if H does not divide the rows or H_kv does not divide H.
    Source: notes §4.4; Ainslie et al. 2023.
    """
    for name, value in (("H", H), ("H_kv", H_kv)):
        require_positive(value, "pool_heads", name, integer=True)
    require(w.ndim == 2 and w.shape[0] % H == 0, "pool_heads", "w", f"of shape (H d_head, d_model) with H = {H}", w)
    require(H % H_kv == 0, "pool_heads", "H_kv", f"a divisor of H = {H}", H_kv)
    d_head = w.shape[0] // H
    return w.reshape(H_kv, H // H_kv, d_head, -1).mean(1).reshape(H_kv * d_head, -1)


class HeadCost(NamedTuple):
    """Multiplications and additions of scores and mixing, and numbers that the softmax stores."""

    operations: int
    stored: int


def head_cost(B: int, L: int, d_model: int, H: int) -> HeadCost:
    r"""What cutting the width into H heads costs: nothing in products, H times in probabilities.

    Equation: `mha-cost-invariance` products $4BL^2d_{\rm model}$ for any H; probabilities $BHL^2$
    Shapes: -> two counts; 2 operations a multiplication with its addition
    Raises: ValueError unless all are positive integers and H divides d_model.
    Source: notes §4.1.
    Differs: the softmax and what it stores do grow with H (erratum 21).
    """
    for name, value in (("B", B), ("L", L), ("d_model", d_model), ("H", H)):
        require_positive(value, "head_cost", name, integer=True)
    require(d_model % H == 0, "head_cost", "H", f"a divisor of d_model = {d_model}", H)
    scores = mixing = 2 * B * H * L * L * (d_model // H)
    return HeadCost(scores + mixing, B * H * L * L)


def _example_latents(rng):
    d, H, M = 4, 2, [1, 3][rng.integers(2)]
    shapes = [(M, d), (2, 5, d), (d, d), (d, d), (d, d), (d, d)]
    return tuple(rng.normal(size=shape) for shape in shapes), {"H": H}


@written("perceiver_attention", example=_example_latents)
def perceiver_attention(
    latents: Float[Tensor, "M d"],
    x: Float[Tensor, "B L d"],
    w_q: Float[Tensor, "d d"],
    w_k: Float[Tensor, "d d"],
    w_v: Float[Tensor, "d d"],
    w_out: Float[Tensor, "d d"],
    *,
    H: int,
    keep: np.ndarray | None = None,
) -> Float[Tensor, "B M d"]:
    r"""A few learnt latents read a long sequence.

    Equation: `perceiver-latent-attention` $\mathbf A_1=\mathrm{Attn}(\mathbf Z,\mathbf X,\mathbf X),\ \mathbf Z\in\mathbb R^{M\times d}$ the same for the batch
    Shapes: latents (M, d), x (B, L, d), four matrices (d, d), keep broadcastable to (B, H, M, L) -> (B, M, d)
    Raises: ValueError if widths or heads do not belong together.
    Source: notes §4.5; Jaegle et al. 2021.
    Differs: the notes call this MLA; DeepSeek's MLA compresses the cache's width, not the sequence (erratum 24).
    """
    fits = latents.ndim == 2 and x.ndim == 3 and latents.shape[-1] == x.shape[-1]
    require(fits, "perceiver_attention", "latents", f"of shape (M, d) with the width of x, {x.shape[-1]}", latents)
    z: Any = latents.unsqueeze(0).expand(x.shape[0], *latents.shape)  # (B, M, d)
    return multi_head_attention(z, x, w_q, w_k, w_v, w_out, H=H, keep=keep)
