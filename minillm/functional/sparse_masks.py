r"""Sparse patterns of attention as keep-masks: which keys a query may look at, true where it may.

Positions count from 0, and with more keys than queries the last query is aligned with the last key, as behind a
cache. All patterns but `global_mask` look back only ($j\le i$).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from minillm.checks import require, require_positive

Keep = Bool[np.ndarray, "L_q L_k"]


def _positions(name: str, L_q: int, L_k: int | None, **sizes: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions i (L_q, 1) of queries and j (L_k,) of keys, after checking the sizes."""
    L_k = L_q if L_k is None else L_k
    for what, value in {"L_q": L_q, "L_k": L_k, **sizes}.items():
        require_positive(value, name, what, integer=True)
    require(L_k >= L_q, name, "L_k", f"at least L_q = {L_q}", L_k)
    return np.arange(L_k - L_q, L_k)[:, None], np.arange(L_k)


def window_mask(L_q: int, w: int, L_k: int | None = None) -> Keep:
    r"""Each query sees itself and the w - 1 keys before it.

    Equation: `sparse-attention-window` keep $j\in(i-w,i]$
    Shapes: -> (L_q, L_k); $w\ge L$ is the causal mask
    Raises: ValueError unless sizes are positive integers and L_k is at least L_q.
    Source: notes §4.11 (heading); Beltagy et al. 2020.
    """
    i, j = _positions("window_mask", L_q, L_k, w=w)
    return (j <= i) & (j > i - w)


def strided_mask(L_q: int, s: int, L_k: int | None = None) -> Keep:
    r"""The last s keys, and before them every s-th.

    Equation: `sparse-attention-strided` strided: $i-j<s$ or $(i-j)\bmod s=0$, $j\le i$
    Shapes: -> (L_q, L_k); about $2L\sqrt L$ pairs at $s\approx\sqrt L$
    Raises: ValueError unless sizes are positive integers and L_k is at least L_q.
    Source: notes §4.11 (heading); Child et al. 2019.
    """
    i, j = _positions("strided_mask", L_q, L_k, s=s)
    return (j <= i) & ((i - j < s) | ((i - j) % s == 0))


def fixed_mask(L_q: int, s: int, c: int, L_k: int | None = None) -> Keep:
    r"""The query's own block of s, and the last c positions of every earlier block.

    Equation: `sparse-attention-strided` fixed: $\lfloor i/s\rfloor=\lfloor j/s\rfloor$ or $j\bmod s\ge s-c$, $j\le i$
    Shapes: -> (L_q, L_k)
    Raises: ValueError unless sizes are positive integers, c at most s, and L_k at least L_q.
    Source: notes §4.11 (heading); Child et al. 2019.
    """
    i, j = _positions("fixed_mask", L_q, L_k, s=s, c=c)
    require(c <= s, "fixed_mask", "c", f"at most s = {s}", c)
    return (j <= i) & ((i // s == j // s) | (j % s >= s - c))


def dilated_mask(L_q: int, w: int, r: int, L_k: int | None = None) -> Keep:
    r"""A window of w keys, r positions apart.

    Equation: `sparse-attention-dilated` keep $j\le i$, $i-j\equiv0\bmod r$, $i-j<rw$
    Shapes: -> (L_q, L_k); $r=1$ is the window
    Raises: ValueError unless sizes are positive integers and L_k is at least L_q.
    Source: notes §4.11 (heading).
    """
    i, j = _positions("dilated_mask", L_q, L_k, w=w, r=r)
    return (j <= i) & ((i - j) % r == 0) & (i - j < r * w)


def global_mask(L: int, w: int, tokens: Sequence[int], causal: bool = True) -> Keep:
    r"""A window, and some tokens that see all and are seen by all.

    Equation: `sparse-attention-global` window, or i or j in the global set (and causal in a decoder)
    Shapes: -> (L, L). Causal: the window looks back. Otherwise it is $|i-j|<w$, both ways.
    Raises: ValueError unless sizes are positive integers; IndexError for a token that is not in [0, L).
    Source: notes §4.11 (heading); Beltagy et al. 2020.
    """
    i, j = _positions("global_mask", L, None, w=w)
    special = np.zeros(L, dtype=bool)
    for token in tokens:
        require(0 <= token < L, "global_mask", "tokens", f"in [0, {L})", token, error=IndexError)
        special[token] = True
    keep = (np.abs(i - j) < w) | special | special[:, None]
    return keep & (j <= i) if causal else keep


def sink_mask(L_q: int, w: int, n_sink: int, L_k: int | None = None) -> Keep:
    r"""A window, and the first tokens for ever.

    Equation: `attention-sink` keep the first $n_s$ tokens and the window, $j\le i$
    Shapes: -> (L_q, L_k)
    Raises: ValueError unless L_q, L_k and w are positive integers, n_sink a non-negative one, and L_k at least L_q.
    Source: notes §4.11 (heading); Xiao et al. 2023.
    """
    i, j = _positions("sink_mask", L_q, L_k, w=w)
    require_positive(n_sink, "sink_mask", "n_sink", integer=True, zero_ok=True)
    return (j <= i) & ((j > i - w) | (j < n_sink))


def bigbird_blocks(
    n_blocks: int, window: int, n_global: int, n_random: int, rng: np.random.Generator, causal: bool = True
) -> Bool[np.ndarray, "n n"]:
    r"""Window, global and random blocks together, one entry a block.

    Equation: `sparse-attention-bigbird` union of three masks
    Shapes: -> (n_blocks, n_blocks): the last ``window`` blocks (both ways unless causal), the first ``n_global`` as rows
        and columns, and ``n_random`` others a row, as far as there are others.
    Raises: ValueError unless n_blocks and window are positive and the others non-negative integers.
    Source: notes §4.11 (heading); Zaheer et al. 2020.
    """
    i, j = _positions("bigbird_blocks", n_blocks, None, window=window)
    for what, value in {"n_global": n_global, "n_random": n_random}.items():
        require_positive(value, "bigbird_blocks", what, integer=True, zero_ok=True)
    allowed = j <= i if causal else np.ones((n_blocks, n_blocks), dtype=bool)
    keep = allowed & ((np.abs(i - j) < window) | (j < n_global) | (i < n_global))
    for row, (seen, may) in enumerate(zip(keep, allowed, strict=True)):
        others = np.flatnonzero(may & ~seen)
        keep[row, rng.choice(others, size=min(n_random, len(others)), replace=False)] = True
    return keep


def expand_blocks(blocks: Bool[np.ndarray, "n m"], block: int, L_q: int, L_k: int, causal: bool = True) -> Keep:
    r"""The mask of positions that a mask of blocks stands for.

    Equation: `sparse-attention-block` position (i, j) is kept if block $(\lfloor i/b\rfloor,\lfloor j/b\rfloor)$ is
    Shapes: blocks (ceil(L_q / block), ceil(L_k / block)) -> (L_q, L_k), with j <= i too if causal
    Raises: ValueError unless the sizes are positive integers and the blocks cover them; for causal unless L_k = L_q.
    Source: notes §4.11 (heading).
    """
    check_blocks("expand_blocks", blocks, block, L_q, L_k, causal)
    keep = blocks.repeat(block, axis=0)[:L_q].repeat(block, axis=1)[:, :L_k]
    return np.tril(keep) if causal else keep


def check_blocks(name: str, blocks: np.ndarray, block: int, L_q: int, L_k: int, causal: bool) -> None:
    """Refuse a mask of blocks that does not cover the queries and keys."""
    for what, value in {"block": block, "L_q": L_q, "L_k": L_k}.items():
        require_positive(value, name, what, integer=True)
    wanted = (-(-L_q // block), -(-L_k // block))
    require(blocks.shape == wanted and blocks.dtype == bool, name, "blocks", f"boolean of shape {wanted}", blocks)
    require(not causal or L_q == L_k, name, "L_k", f"L_q = {L_q} for a causal pattern", L_k)
