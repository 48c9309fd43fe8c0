"""The truth for this family: the attention of `minillm.functional`, with the masks of `minillm.functional.masks`.

All take and return `minillm` tensors; lengths and starts are arrays of integers. A reader's own kernel has
these signatures on torch tensors (`--impl`).
"""

import numpy as np

from minillm.autograd import Tensor, where
from minillm.functional import output_head
from minillm.functional.attention import attention_weights, repeat_heads, scaled_scores
from minillm.functional.masks import causal_mask, full_mask, padding_mask, prefix_mask
from minillm.functional.softmax import logsumexp
from minillm.functional.sparse_masks import window_mask


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: np.ndarray | None = None, prefix: np.ndarray | None = None,
    causal: bool = False, window: int | None = None, align: str = "bottom-right",
    scale: float | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """q (B, H, L_q, d_head), k (B, H_kv, L_k, d_head), v (B, H_kv, L_k, d_v) -> (B, H, L_q, d_v)."""
    return attention_with_lse(q, k, v, key_lengths, prefix, causal, window, align, scale, softcap)[0]


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: np.ndarray | None = None, prefix: np.ndarray | None = None,
    causal: bool = False, window: int | None = None, align: str = "bottom-right",
    scale: float | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attention`, and the log-sum-exps of the scores (B, H, L_q), -inf where a query sees no key."""
    (B, H, L_q, _), L_k = q.shape, k.shape[2]
    keep = np.broadcast_to(mask(L_q, L_k, prefix, causal, window, align), (B, 1, L_q, L_k))
    if key_lengths is not None:
        keep = keep & padding_mask(np.arange(L_k) < key_lengths[:, None])
    return _attend(q, k, v, np.broadcast_to(keep, (B, H, L_q, L_k)), scale, softcap)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, starts_q: np.ndarray, starts_k: np.ndarray,
    causal: bool = False, window: int | None = None, align: str = "bottom-right",
    scale: float | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """q (T_q, H, d_head), k (T_k, H_kv, d_head), v (T_k, H_kv, d_v) -> (T_q, H, d_v); documents begin at the starts."""
    keep = np.zeros((q.shape[0], k.shape[0]), dtype=bool)
    for n in range(len(starts_q) - 1):
        rows, cols = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])
        keep[rows, cols] = mask(rows.stop - rows.start, cols.stop - cols.start, None, causal, window, align)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # (1, heads, T, width)
    out, _ = _attend(q, k, v, np.broadcast_to(keep, (1, q.shape[1], *keep.shape)), scale, softcap)
    return out[0].transpose(0, 1)


def mask(
    L_q: int, L_k: int, prefix: np.ndarray | None, causal: bool, window: int | None, align: str
) -> np.ndarray:  # (L_q, L_k), or (B, 1, L_q, L_k) with a prefix
    """Who sees whom: a corner of a square mask, the last rows and columns of it or the first."""
    L_q, L_k = int(L_q), int(L_k)  # starts are NumPy's integers
    n = max(L_q, L_k, 1)
    skipped = n - L_k if align == "bottom-right" else 0  # columns of the square to the left of key 0
    if prefix is not None:
        square = prefix_mask(n, np.where(prefix > 0, np.minimum(prefix, L_k) + skipped, 0))
    elif window is not None:
        square = window_mask(n, window)
    else:
        square = causal_mask(n) if causal else full_mask(n)
    return square[..., n - L_q :, n - L_k :] if align == "bottom-right" else square[..., :L_q, :L_k]


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: np.ndarray, scale, softcap) -> tuple[Tensor, Tensor]:
    times = q.shape[1] // k.shape[1]
    scores = scaled_scores(q, repeat_heads(k, times), scale)  # (B, H, L_q, L_k)
    if softcap is not None:
        scores = output_head.softcap(scores, softcap)
    out = attention_weights(scores, keep) @ repeat_heads(v, times)
    some = keep.any(-1)  # (B, H, L_q): a query that sees nothing has the logarithm of 0
    seen = where(keep | ~np.expand_dims(some, -1), where(keep, scores, 0.0), -np.inf)
    return out, where(some, logsumexp(seen), -np.inf)
