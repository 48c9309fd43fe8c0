r"""Relative positions: what is added to the scores, by the distance of query and key."""

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.attention import attention_weights, check_attention
from minillm.functional.linear import embedding
from minillm.functional.masks import causal_mask


def distances(q_positions: np.ndarray, k_positions: np.ndarray) -> Int[np.ndarray, "L_q L_k"]:
    """How far back each key lies, i - j: (L_q,) and (L_k,) -> (L_q, L_k)."""
    return np.asarray(q_positions)[:, None] - np.asarray(k_positions)


def alibi_slopes(H: int) -> Float[np.ndarray, " H"]:
    r"""The slope of every head.

    Equation: `pos-alibi` $m_h=2^{-8h/H},\ h=1..H$; for other H than powers of 2, the slopes of $n=2^{\lfloor\log_2H\rfloor}$ heads, then the 1st, 3rd, ... of $2n$
    Shapes: -> (H,)
    Raises: ValueError unless H is a positive integer.
    Source: notes §6; Press et al. 2022.
    """
    require_positive(H, "alibi_slopes", "H", integer=True)

    def regular(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    n = 1 << (int(H).bit_length() - 1)
    return np.concatenate([regular(n), regular(2 * n)[0::2][: H - n]])


def alibi_bias(q_positions: np.ndarray, k_positions: np.ndarray, H: int) -> Float[np.ndarray, "H L_q L_k"]:
    r"""A penalty that grows with the distance, at another rate in every head.

    Equation: `pos-alibi` $S_{ij}\mathrel{+}=-m_h(i-j)$ for $j\le i$, without a causal mask $-m_h|i-j|$
    Shapes: positions (L_q,), (L_k,) -> (H, L_q, L_k), no parameters
    Raises: ValueError unless H is a positive integer.
    Source: notes §6; Press et al. 2022.
    """
    return -alibi_slopes(H)[:, None, None] * np.abs(distances(q_positions, k_positions))


def relative_bucket(
    distance: Int[np.ndarray, "..."], n_buckets: int = 32, D_max: int = 128, *, bidirectional: bool = False
) -> Int[np.ndarray, "..."]:
    r"""The bucket of a distance: one each for near keys, wider and wider ones for far keys.

    Equation: `pos-relative-bias` bucket n if $n<\frac{N_b}2$, else $\min\big(N_b-1,\frac{N_b}2+\big\lfloor\frac{N_b}2\frac{\ln(2n/N_b)}{\ln(2D_{\max}/N_b)}\big\rfloor\big)$
    Shapes: distance i - j (...) -> (...), in [0, N_b)
    Raises: ValueError for an odd or too small number of buckets, or a largest distance that is not beyond them.
    Source: notes §6; Raffel et al. 2020 (T5).

    Causal: n = max(i - j, 0). Bidirectional: half of the buckets for keys behind the query, n = |i - j| in each half.
    """
    require_positive(n_buckets, "relative_bucket", "n_buckets", integer=True)
    half = n_buckets // 2 if bidirectional else n_buckets
    least = 4 if bidirectional else 2
    even = n_buckets % least == 0
    require(even, "relative_bucket", "n_buckets", f"a multiple of {least}", n_buckets)
    exact = half // 2
    require(
        D_max > exact, "relative_bucket", "D_max", f"above {exact}, the distances with a bucket of their own", D_max
    )
    distance = np.asarray(distance)
    n = np.abs(distance) if bidirectional else np.maximum(distance, 0)
    share = np.log(np.maximum(n, exact) / exact) / np.log(D_max / exact)
    far = np.minimum(exact + np.floor(share * (half - exact)).astype(np.int64), half - 1)
    bucket = np.where(n < exact, n, far)
    return bucket + (half * (distance < 0) if bidirectional else 0)


def _example_bias(rng):
    keys = np.arange([5, 1][rng.integers(2)])
    return (rng.normal(size=(2, 8)),), {
        "q_positions": np.arange(3), "k_positions": keys, "D_max": 6, "bidirectional": bool(rng.integers(2))
    }  # fmt: skip


@written("relative_bias", example=_example_bias)
def relative_bias(
    table: Float[Tensor, "H N_b"],
    q_positions: np.ndarray,
    k_positions: np.ndarray,
    D_max: int = 128,
    *,
    bidirectional: bool = False,
) -> Float[Tensor, "H L_q L_k"]:
    r"""A learnt number for every head and bucket of distances.

    Equation: `pos-relative-bias` $S_{ij}\mathrel{+}=b_{h,\mathrm{bucket}(i-j)}$
    Shapes: table (H, N_b), positions (L_q,), (L_k,) -> (H, L_q, L_k), shared by all layers
    Raises: ValueError as `relative_bucket` does.
    Source: notes §6; Raffel et al. 2020 (T5).
    """
    buckets = relative_bucket(
        distances(q_positions, k_positions), table.shape[1], D_max, bidirectional=bidirectional
    )  # (L_q, L_k)
    return embedding(buckets, table.T).permute(2, 0, 1)  # (H, L_q, L_k)


def _example_shaw(rng):
    L_q, L_k, c = [(3, 3, 1), (2, 4, 2), (1, 1, 1)][rng.integers(3)]
    arrays = [(2, 2, L_q, 3), (2, 2, L_k, 3), (2, 2, L_k, 2), (2 * c + 1, 3), (2 * c + 1, 2)]
    return tuple(rng.normal(size=shape) for shape in arrays), {"keep": [None, causal_mask(L_q, L_k)][rng.integers(2)]}


@written("shaw_attention", example=_example_shaw)
def shaw_attention(
    q: Float[Tensor, "B H L_q d"],
    k: Float[Tensor, "B H L_k d"],
    v: Float[Tensor, "B H L_k d_v"],
    w_k: Float[Tensor, "n d"],
    w_v: Float[Tensor, "n d_v"],
    keep: np.ndarray | None = None,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""Attention whose keys and values know how far away they are.

    Equation: `pos-relative-shaw` $S_{ij}=q_i^\top(k_j+a^K_{ij})/\sqrt{d_{\rm head}},\ o_i=\sum_j\alpha_{ij}(v_j+a^V_{ij}),\ a_{ij}=w_{\mathrm{clip}(j-i,-c,c)}$
    Shapes: q (B, H, L_q, d), k (B, H, L_k, d), v (B, H, L_k, d_v), w_k (2c + 1, d), w_v (2c + 1, d_v) shared by heads
        -> (B, H, L_q, d_v); the last query is aligned with the last key
    Raises: ValueError if the shapes do not belong together or the tables have an even number of rows.
    Source: notes §6; Shaw et al. 2018.
    """
    require(check_attention(q, k, v) == 1, "shaw_attention", "H_kv", f"H = {q.shape[1]}", f"{k.shape[1]}")
    for name, w, d in (("w_k", w_k, q.shape[-1]), ("w_v", w_v, v.shape[-1])):
        fits = w.ndim == 2 and w.shape[1] == d and w.shape[0] % 2 == 1 and w.shape[0] == w_k.shape[0]
        require(fits, "shaw_attention", name, f"of shape (2c + 1, {d})", w)
    L_q, L_k, c = q.shape[2], k.shape[2], w_k.shape[0] // 2
    index = np.clip(-distances(np.arange(L_k - L_q, L_k), np.arange(L_k)), -c, c) + c  # (L_q, L_k)
    a_k, a_v = embedding(index, w_k), embedding(index, w_v)  # (L_q, L_k, d), (L_q, L_k, d_v)
    scores = q @ k.T + (q.unsqueeze(3) * a_k).sum(-1)  # (B, H, L_q, L_k)
    weights = attention_weights(scores * (1.0 / float(np.sqrt(q.shape[-1]))), keep)
    return weights @ v + (weights.unsqueeze(-1) * a_v).sum(3)
