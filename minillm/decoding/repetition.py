r"""Controls that read the text: how often a token was said, and which token would say an n-gram again."""

import numpy as np
from jaxtyping import Float, Int

from minillm.checks import require, require_positive


def count_tokens(text: Int[np.ndarray, "B L"], V: int) -> Int[np.ndarray, "B V"]:
    r"""How often every token occurs in each row.

    Equation: `sample-penalties` the counts $c_v$
    Shapes: text (B, L) -> (B, V)
    Raises: IndexError for a token outside [0, V).
    Source: topics #9.
    """
    inside = text.size == 0 or (text.min() >= 0 and text.max() < V)
    require(inside, "count_tokens", "the tokens", f"in [0, {V})", text, error=IndexError)
    flat = text + V * np.arange(len(text))[:, None]
    return np.bincount(flat.ravel(), minlength=len(text) * V).reshape(len(text), V)


def forbid_repeated_ngrams(
    logits: Float[np.ndarray, "B V"], text: Int[np.ndarray, "B L"], n: int
) -> Float[np.ndarray, "B V"]:
    r"""Exclude tokens that would complete an n-gram which the text has already.

    Equation: `sample-penalties` no-repeat: exclude $v$ if $(y_{t-n+1},\dots,y_{t-1},v)$ occurs in the text
    Shapes: logits (B, V), text (B, L) -> (B, V), minus infinity where excluded
    Raises: ValueError unless n is a positive integer and there is one text a row; when every token is excluded.
    Source: topics #9; Paulus et al. 2018.
    """
    where = "forbid_repeated_ngrams"
    require_positive(n, where, "n", integer=True)
    require(text.ndim == 2 and len(text) == len(logits), where, "the text", f"of shape (B={len(logits)}, L)", text)
    if text.shape[1] < n:
        return logits
    out = logits.copy()
    windows = np.lib.stride_tricks.sliding_window_view(text, n, axis=1)  # (B, L - n + 1, n)
    recent = text[:, text.shape[1] - n + 1 :]  # (B, n - 1), the beginning of what would be repeated
    rows, places = np.nonzero((windows[..., :-1] == recent[:, None]).all(-1))
    out[rows, windows[rows, places, -1]] = -np.inf
    left = np.isfinite(out).any(-1).all()
    require(bool(left), where, "n", "such that a token is left", n, "Every token would repeat; choose a larger n.")
    return out
