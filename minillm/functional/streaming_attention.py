"""Exact attention over keys that come in blocks, as written: the softmax is corrected as it goes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, where
from minillm.autograd import primitives as ops
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.attention import causal_mask, check_attention, repeat_heads, scaled_scores


class Running(NamedTuple):
    """What is known of a softmax after some of its keys, for every query."""

    top: Tensor  # m: largest score so far, (B, H, L_q, 1)
    total: Tensor  # l: sum of exp(score - m), (B, H, L_q, 1)
    out: Tensor  # o: sum of exp(score - m) v, not yet divided, (B, H, L_q, d_v)


def _example_step(rng):
    n = int(rng.integers(1, 4))
    top, total, out = (
        rng.normal(size=(1, 2, 3, 1)),
        rng.uniform(0.5, 2, size=(1, 2, 3, 1)),
        rng.normal(size=(1, 2, 3, 2)),
    )
    return (top, total, out, rng.normal(size=(1, 2, 3, n)), rng.normal(size=(1, 2, n, 2))), {}


@written("online_softmax_step", example=_example_step)
def online_softmax_step(
    top: Float[Tensor, "B H L_q 1"],
    total: Float[Tensor, "B H L_q 1"],
    out: Float[Tensor, "B H L_q d_v"],
    scores: Float[Tensor, "B H L_q block"],
    v: Float[Tensor, "B H block d_v"],
) -> Running:
    r"""Take one more block of keys into a running softmax (`Running` says what its parts are).

    Equation: `flash-attention` $m'=\max(m,\tilde m)$, $\ell'=e^{m-m'}\ell+e^{\tilde m-m'}\tilde\ell$, $o'=e^{m-m'}o+e^{\tilde m-m'}\tilde P\mathbf V$
    Shapes: scores (B, H, L_q, block) with minus infinity where hidden, v (B, H, block, d_v) -> new top, total and out
    Raises: ValueError if the scores are not those of the queries and the block.
    Source: notes §4.10; Milakov and Gimelshein 2018; Dao et al. 2022.
    """
    wanted = (*top.shape[:3], v.shape[2])
    require(scores.shape == wanted, "online_softmax_step", "scores", f"of shape {wanted}", scores)
    new_top = ops.maximum(top, scores.max(-1, keepdims=True))
    shift = where(np.isfinite(new_top.data), new_top, 0.0)  # a query without a key yet: exp(-inf - 0) is 0
    old, p = (top - shift).exp(), (scores - shift).exp()
    return Running(new_top, old * total + p.sum(-1, keepdims=True), old * out + p @ v)


def _example(rng):
    H, H_kv = [(2, 2), (2, 1)][rng.integers(2)]
    causal = bool(rng.integers(2))
    L_q, L_k = [(4, 4), (2, 5), (1, 3)][rng.integers(3)]
    arrays = rng.normal(size=(2, H, L_q, 3)), rng.normal(size=(2, H_kv, L_k, 3)), rng.normal(size=(2, H_kv, L_k, 2))
    return arrays, {"block": int(rng.integers(1, 4)), "causal": causal}


@written("streaming_attention", example=_example)
def streaming_attention(
    q: Float[Tensor, "B H L_q d"],
    k: Float[Tensor, "B H_kv L_k d"],
    v: Float[Tensor, "B H_kv L_k d_v"],
    block: int = 64,
    causal: bool = False,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""Dense attention without ever holding all scores.

    Equation: `flash-attention` start $m=-\infty$, $\ell=0$, $o=0$; output $o/\ell$ at the end
    Shapes: q (B, H, L_q, d_head), k (B, H_kv, L_k, d_head), v (B, H_kv, L_k, d_v) -> (B, H, L_q, d_v); needs
        (B, H, L_q, block + d_v) numbers at a time
    Raises: ValueError if the shapes do not belong together or block is not a positive integer.
    Source: notes §4.10; Dao et al. 2022.
    """
    times = check_attention(q, k, v)
    require_positive(block, "streaming_attention", "block", integer=True)
    (B, H, L_q, _), (_, _, L_k, d_v) = q.shape, v.shape
    k, v, keep = repeat_heads(k, times), repeat_heads(v, times), causal_mask(L_q, L_k)
    empty = np.full((B, H, L_q, 1), -np.inf, q.dtype), np.zeros((B, H, L_q, 1), q.dtype)
    state = Running(Tensor(empty[0]), Tensor(empty[1]), Tensor(np.zeros((B, H, L_q, d_v), q.dtype)))
    for start in range(0, L_k, block):
        keys = slice(start, start + block)
        scores = scaled_scores(q, k[:, :, keys])  # (B, H, L_q, block)
        if causal:
            scores = scores.masked_fill(~keep[:, keys], -np.inf)
        state = online_softmax_step(*state, scores, v[:, :, keys])
    return state.out / where(state.total.data == 0, 1.0, state.total)
