"""Sparse attention as written: the largest scores of a row, and kept blocks only."""

import numpy as np
from jaxtyping import Bool, Float

from minillm.autograd import Tensor, cat
from minillm.autograd.registry import written
from minillm.checks import require_positive
from minillm.functional.attention import attention_weights, causal_mask, check_attention, repeat_heads, scaled_scores
from minillm.functional.sparse_masks import check_blocks


def topk_keep(scores: np.ndarray, k: int, keep: np.ndarray | None = None) -> np.ndarray:
    """True at the k largest allowed scores of each row, the earlier key first among equals."""
    allowed = np.ones(scores.shape, bool) if keep is None else np.broadcast_to(keep, scores.shape)
    order = np.argsort(np.where(allowed, -scores, np.inf), axis=-1, kind="stable")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order[..., :k], True, axis=-1)
    return chosen & allowed


def _example_topk(rng):
    H, H_kv = [(2, 2), (2, 1)][rng.integers(2)]
    L_q, L_k = [(4, 4), (1, 5), (3, 2)][rng.integers(3)]
    arrays = rng.normal(size=(2, H, L_q, 3)), rng.normal(size=(2, H_kv, L_k, 3)), rng.normal(size=(2, H_kv, L_k, 2))
    keep = causal_mask(L_q) if L_q == L_k else None
    return arrays, {"k_keep": int(rng.integers(1, 4)), "keep": keep}


@written("topk_attention", example=_example_topk)
def topk_attention(
    q: Float[Tensor, "B H L_q d"],
    k: Float[Tensor, "B H_kv L_k d"],
    v: Float[Tensor, "B H_kv L_k d_v"],
    k_keep: int,
    keep: np.ndarray | None = None,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""Attention to the keys with the largest scores of each query.

    Equation: `sparse-attention-topk` keep the $k$ largest scores per row
    Shapes: q (B, H, L_q, d_head), k (B, H_kv, L_k, d_head), v (B, H_kv, L_k, d_v) -> (B, H, L_q, d_v)
    Raises: ValueError unless k_keep is a positive integer and the shapes belong together.
    Source: notes §4.11 (heading).
    Differs: nothing is saved: all scores are computed before the choice, which has no gradient of its own.
    """
    times = check_attention(q, k, v)
    require_positive(k_keep, "topk_attention", "k_keep", integer=True)
    scores = scaled_scores(q, repeat_heads(k, times))  # (B, H, L_q, L_k)
    return attention_weights(scores, topk_keep(scores.data, k_keep, keep)) @ repeat_heads(v, times)


def _example_block(rng):
    H, H_kv = [(2, 2), (2, 1)][rng.integers(2)]
    L, block = [(5, 2), (4, 2), (3, 4), (1, 1)][rng.integers(4)]
    n = -(-L // block)
    arrays = rng.normal(size=(2, H, L, 3)), rng.normal(size=(2, H_kv, L, 3)), rng.normal(size=(2, H_kv, L, 2))
    return arrays, {"blocks": rng.random((n, n)) < 0.6, "block": block, "causal": bool(rng.integers(2))}


@written("block_sparse_attention", example=_example_block)
def block_sparse_attention(
    q: Float[Tensor, "B H L_q d"],
    k: Float[Tensor, "B H_kv L_k d"],
    v: Float[Tensor, "B H_kv L_k d_v"],
    blocks: Bool[np.ndarray, "n m"],
    block: int,
    causal: bool = True,
) -> Float[Tensor, "B H L_q d_v"]:
    r"""Attention that computes only the blocks that are kept.

    Equation: `sparse-attention-block` compute only kept blocks
    Shapes: q (B, H, L_q, d_head), k (B, H_kv, L_k, d_head), v (B, H_kv, L_k, d_v),
        blocks (ceil(L_q / block), ceil(L_k / block)) -> (B, H, L_q, d_v)
    Raises: ValueError if the shapes do not belong together or the blocks do not cover them.
    Source: notes §4.11 (heading).
    """
    times = check_attention(q, k, v)
    L_q, L_k = q.shape[2], k.shape[2]
    check_blocks("block_sparse_attention", blocks, block, L_q, L_k, causal)
    k, v = repeat_heads(k, times), repeat_heads(v, times)
    outputs = []
    for row, kept in enumerate(blocks):
        queries = np.arange(row * block, min((row + 1) * block, L_q))
        keys = np.flatnonzero(kept.repeat(block)[:L_k])
        keys = keys[keys <= queries[-1]] if causal else keys
        if len(keys) == 0:
            outputs.append(Tensor(np.zeros((*q.shape[:2], len(queries), v.shape[3]), v.dtype)))
            continue
        part = scaled_scores(q[:, :, queries[0] : queries[-1] + 1], k[:, :, keys])  # (B, H, block, kept keys)
        weights = attention_weights(part, keys <= queries[:, None] if causal else None)
        outputs.append(weights @ v[:, :, keys])
    return cat(outputs, axis=2)
