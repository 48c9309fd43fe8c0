"""The truth for this family: scores, weights and context of `minillm.functional`, sequence by sequence.

All take `minillm` tensors (and arrays for lengths and tables) and return tensors; `kernels.evaluate` brings arrays of any
dtype to the precision wanted. A reader's own kernel has these signatures on torch tensors (`--impl`). ``lengths`` of
None means that every position of the cache is there, ``scale`` of None one over the root of the key's width.
"""

import numpy as np

from minillm.autograd import Tensor, stack
from minillm.functional.attention import attention_weights, keep_of, repeat_heads, scaled_scores
from minillm.functional.output_head import softcap as capped


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: np.ndarray | None,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
) -> tuple[Tensor, np.ndarray]:  # fmt: skip
    """q (B, H, L_q, d), k (B, H_kv, capacity, d), v (B, H_kv, capacity, d_v), lengths (B,) -> o (B, H, L_q, d_v), lse (B, H, L_q).

    The new tokens are the last of each sequence: row i sees the keys up to place length - L_q + i.
    """
    rows = [
        _one(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], scale, window, softcap)
        for b, n in enumerate(_clipped(lengths, len(q.data), k.shape[2]))
    ]
    return stack([o for o, _ in rows]), np.stack([lse for _, lse in rows])


def paged_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: np.ndarray | None, table: np.ndarray,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
) -> tuple[Tensor, np.ndarray]:  # fmt: skip
    """The same with k (pages, H_kv, page, d), v (pages, H_kv, page, d_v): table (B, n) says which pages a sequence has."""
    page, rows = k.shape[2], []
    for b, n in enumerate(_clipped(lengths, len(q.data), page * table.shape[1])):
        own = table[b, : -(-n // page)]
        keys, values = (_in_order(x, own)[:, :, :n] for x in (k, v))
        rows.append(_one(q[b : b + 1], keys, values, scale, window, softcap))
    return stack([o for o, _ in rows]), np.stack([lse for _, lse in rows])


def latent_decode_attention(
    q: Tensor, c: Tensor, lengths: np.ndarray | None, d_v: int,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
) -> tuple[Tensor, np.ndarray]:  # fmt: skip
    """q (B, H, L_q, d), c (B, capacity, d): every head's keys are c, its values the first d_v columns of c."""
    k = c.unsqueeze(1)  # (B, 1, capacity, d)
    return decode_attention(q, k, k[:, :, :, :d_v], lengths, scale, window, softcap)


def merge_attention(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Parts over disjoint keys, o (n, ..., d_v) with lse (n, ...), as one: (..., d_v), (...)."""
    top = lse.data.max(0)
    top = np.where(np.isfinite(top), top, 0).astype(top.dtype)
    weights = (lse - top).exp()  # (n, ...)
    total = weights.sum(0)
    alive = (lse.data > -np.inf)[..., None]
    parts = Tensor(np.where(alive, o.data, 0).astype(o.dtype))
    merged = (parts * weights.unsqueeze(-1)).sum(0) / np.where(total.data == 0, 1, total.data)[..., None]
    with np.errstate(divide="ignore"):
        return merged, Tensor((np.log(total.data) + top).astype(top.dtype))


def _clipped(lengths: np.ndarray | None, batch: int, capacity: int) -> list[int]:
    return [capacity] * batch if lengths is None else [int(n) for n in np.clip(lengths, 0, capacity)]


def _in_order(pages: Tensor, own: np.ndarray) -> Tensor:
    """(pages, H_kv, page, d) -> (1, H_kv, n page, d), the pages that are named, in that order."""
    chosen = pages[own.astype(np.int64)].transpose(0, 1)  # (H_kv, n, page, d)
    return chosen.reshape(1, chosen.shape[0], -1, chosen.shape[3])


def _one(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> tuple[Tensor, np.ndarray]:
    """One sequence: (H, L_q, d_v) and (H, L_q)."""
    times = q.shape[1] // k.shape[1]
    scores = scaled_scores(q, repeat_heads(k, times), scale)  # (1, H, L_q, n)
    if softcap is not None:
        scores = capped(scores, softcap)
    keep = keep_of(q.shape[2], k.shape[2], None, True, window)
    assert keep is not None
    o = attention_weights(scores, keep) @ repeat_heads(v, times)
    hidden = np.where(keep, scores.data, -np.inf)
    top = hidden.max(-1, initial=-np.inf)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        lse = safe + np.log(np.exp(hidden - safe[..., None]).sum(-1))
    return o[0], lse[0].astype(scores.dtype)
