r"""Masks: who may look at whom, as boolean arrays that are true where attention is allowed.

A keep-mask broadcasts to the scores (B, H, L_q, L_k). Masks combine by AND; added to the scores, a mask is
$\mathbf M=\log(\text{keep})$, 0 or $-\infty$. Patterns for long texts are in `sparse_masks.py`.
"""

from functools import reduce
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from minillm.checks import message, require, require_positive


def causal_mask(L_q: int, L_k: int | None = None) -> Bool[np.ndarray, "L_q L_k"]:
    r"""Keep-mask of a decoder: query i sees keys up to its own position.

    Equation: `mask-causal` keep $j\le i$
    Shapes: -> (L_q, L_k), true where attention is allowed; with more keys than queries, the last query is aligned
        with the last key, as when the first L_k - L_q keys come from a cache.
    Raises: ValueError for lengths that are negative or no integers.
    Source: bridging §1.1; notes §8.4.
    Differs: the diagonal is kept, though notes call the mask strict (erratum 30).
    """
    L_k = L_q if L_k is None else L_k
    for name, length in (("L_q", L_q), ("L_k", L_k)):
        require_positive(length, "causal_mask", name, integer=True, zero_ok=True)
    return np.tril(np.ones((L_q, L_k), dtype=bool), k=L_k - L_q)


def full_mask(L_q: int, L_k: int | None = None) -> Bool[np.ndarray, "L_q L_k"]:
    r"""Keep-mask of an encoder: everybody sees everybody.

    Equation: `mask-full` $m_{ij}=1$
    Shapes: -> (L_q, L_k)
    Source: notes §8.1.
    """
    return np.ones((L_q, L_q if L_k is None else L_k), dtype=bool)


def padding_mask(real: Bool[np.ndarray, "B L"]) -> Bool[np.ndarray, "B 1 1 L"]:
    r"""Keep-mask of a padded batch: nobody looks at padding.

    Equation: `mask-padding` $m_i\in\{0,1\}^{L_{\max}}$: keys with $m=0$ are hidden
    Shapes: real (B, L), true at real tokens -> (B, 1, 1, L)
    Raises: ValueError unless real is boolean with two axes.
    Source: notes §10.5.
    Differs: padding is not treated as normal tokens (erratum 31).
    """
    real = _boolean(real, "padding_mask", "real", 2, "(B, L)")
    return real[:, None, None, :]


def cross_mask(real: Bool[np.ndarray, "B S"]) -> Bool[np.ndarray, "B 1 1 S"]:
    r"""Keep-mask of cross-attention: every query sees the encoder's real tokens.

    Equation: `mask-cross` $(B,1,1,L_{\rm enc})$, the same for all heads and queries
    Shapes: real (B, S), true at the encoder's real tokens -> (B, 1, 1, S)
    Raises: ValueError unless real is boolean with two axes.
    Source: notes §8.
    """
    return _boolean(real, "cross_mask", "real", 2, "(B, S)")[:, None, None, :]


def prefix_mask(L: int, prefix: int | Int[np.ndarray, " B"]) -> Bool[np.ndarray, "... L L"]:
    r"""Keep-mask of a prefix decoder: the prefix sees all of itself, what follows is causal.

    Equation: `mask-prefix` keep $j\le\max(i,m-1)$ for positions from 0 and a prefix of m tokens
    Shapes: one length m -> (L, L); lengths (B,) -> (B, 1, L, L)
    Raises: ValueError for a prefix that is not in 0..L.
    Source: notes §8.4.
    Differs: the source's cases overlap at i = m, harmlessly (erratum 32).
    """
    require_positive(L, "prefix_mask", "L", integer=True)
    m = np.asarray(prefix)
    inside = m.dtype.kind in "iu" and m.ndim <= 1 and bool(((m >= 0) & (m <= L)).all())
    require(inside, "prefix_mask", "the prefix", f"integers in 0..{L}, the length", prefix)
    places = np.arange(L)
    keep = places <= np.maximum(places[:, None], m[..., None, None] - 1)  # (..., L, L)
    return keep if m.ndim == 0 else keep[:, None]


def document_mask(segments: Int[np.ndarray, "B L"]) -> Bool[np.ndarray, "B 1 L L"]:
    r"""Keep-mask of packed documents: causal, and never across a border.

    Equation: `mask-block-diagonal` $\mathbf 1\{\mathrm{doc}(i)=\mathrm{doc}(j)\}\wedge j\le i$
    Shapes: segments (B, L), the number of each token's document, negative at padding -> (B, 1, L, L)
    Raises: ValueError unless segments are integers with two axes.
    Source: topics #19.
    """
    segments = np.asarray(segments)
    fits = segments.ndim == 2 and segments.dtype.kind in "iu"
    require(fits, "document_mask", "segments", "integers of shape (B, L)", segments)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
    return (same & causal_mask(segments.shape[1]))[:, None]


def loss_mask(prompt_lengths: Int[np.ndarray, " B"], lengths: Int[np.ndarray, " B"], L: int) -> Bool[np.ndarray, "B L"]:
    r"""Which tokens are learnt from: the answer with its EOS; not BOS and the prompt, not the padding.

    Equation: `mask-loss` $m_t=1$ on the completion, 0 elsewhere
    Shapes: prompt_lengths, lengths (B,): tokens before the answer, and all real tokens -> (B, L)
    Raises: ValueError unless 0 <= prompt length <= length <= L for every sequence.
    Source: notes §10.3, §10.5.
    """
    start, stop = np.asarray(prompt_lengths), np.asarray(lengths)
    fits = start.shape == stop.shape and start.ndim == 1 and bool(((start >= 0) & (start <= stop) & (stop <= L)).all())
    received = f"{np.asarray(prompt_lengths).tolist()} and {np.asarray(lengths).tolist()}"
    require(fits, "loss_mask", "prompt lengths and lengths", f"ordered, one each a sequence, up to L = {L}", received)
    places = np.arange(L)
    return (places >= start[:, None]) & (places < stop[:, None])


def combine_masks(*keeps: Bool[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
    r"""What every one of the masks allows.

    Equation: `mask-combine` AND of keep-masks = sum of additive masks
    Shapes: masks that broadcast to each other -> their common shape
    Raises: ValueError for no mask, one that is not boolean, or masks that do not broadcast.
    Source: bridging §1.1; notes §4.1.
    """
    require(len(keeps) > 0, "combine_masks", "the masks", "at least one", "none")
    for keep in keeps:
        require(np.asarray(keep).dtype == bool, "combine_masks", "every mask", "boolean", keep)
    try:
        return reduce(np.logical_and, keeps)
    except ValueError:
        shapes = " and ".join(str(np.shape(keep)) for keep in keeps)
        raise ValueError(
            message("combine_masks", "the masks", "of shapes that broadcast to each other", shapes)
        ) from None


def additive_mask(keep: Bool[np.ndarray, "..."], dtype: Any = np.float32) -> Float[np.ndarray, "..."]:
    r"""The mask as something to add to the scores.

    Equation: `mask-combine` $\mathbf M=\log(\text{keep})$: 0 where allowed, $-\infty$ elsewhere
    Shapes: keep (...) -> (...)
    Raises: ValueError unless the mask is boolean.
    Source: bridging §1.1.
    """
    require(np.asarray(keep).dtype == bool, "additive_mask", "the mask", "boolean", keep)
    return np.where(keep, 0.0, -np.inf).astype(dtype)


def _boolean(array: Any, where: str, what: str, ndim: int, shape: str) -> np.ndarray:
    array = np.asarray(array)
    require(array.dtype == bool and array.ndim == ndim, where, what, f"boolean of shape {shape}", array)
    return array
