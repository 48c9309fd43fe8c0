r"""Dual chunk attention: rotary positions that never leave the range seen in training.

The second reading of the notes' DCA. A model trained on c positions meets a longer text. The keys keep their position
inside a chunk of s < c, and a query has three positions: its own inside the chunk, one for keys of the chunk before,
and c - 1 for everything older.
"""

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor, where
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.attention import attention_weights, causal_mask, check_attention, repeat_heads, scaled_scores
from minillm.functional.positions import rope, rotation_angles


def _check(name: str, L: int, s: int, c: int) -> None:
    for what, value in {"L": L, "chunk": s, "context": c}.items():
        require_positive(value, name, what, integer=True)
    require(s < c, name, "chunk", f"below the training length, {c}", s)


def dual_chunk_positions(L: int, chunk: int, context: int) -> dict[str, Int[np.ndarray, " L"]]:
    r"""Positions by which keys and queries are turned.

    Equation: `dca-dual-chunk` keys $j\bmod s$; queries $i\bmod s$, $\min(i\bmod s+s,c-1)$ and $c-1$
    Shapes: -> "key", "same", "previous" and "older", each (L,)
    Raises: ValueError unless the sizes are positive integers and the chunk is shorter than the context.
    Source: notes §4.9 (heading), the second reading; An et al. 2024.
    """
    _check("dual_chunk_positions", L, chunk, context)
    inside = np.arange(L) % chunk
    previous = np.minimum(inside + chunk, context - 1)
    return {"key": inside, "same": inside, "previous": previous, "older": np.full(L, context - 1)}


def dual_chunk_distances(L: int, chunk: int, context: int) -> Int[np.ndarray, "L L"]:
    r"""The relative position that query i sees key j at; -1 where $j>i$.

    Equation: `dca-dual-chunk` relative positions in $[0,c-1]$, exact for $i-j\le c-s$
    Shapes: -> (L, L)
    Raises: ValueError unless the sizes are positive integers and the chunk is shorter than the context.
    Source: notes §4.9 (heading), the second reading; An et al. 2024.
    Differs: exact up to $\min(s,c-s)$: with chunks of less than half the context, keys two chunks back come sooner
        than $c-s$, and all of them count as c - 1 minus their place.
    """
    at = dual_chunk_positions(L, chunk, context)
    back = _chunks_back(L, chunk)
    query = np.where(back == 0, at["same"][:, None], np.where(back == 1, at["previous"][:, None], context - 1))
    return np.where(causal_mask(L), query - at["key"], -1)


def _chunks_back(L: int, chunk: int) -> np.ndarray:
    """How many chunks before that of query i key j lies."""
    return (np.arange(L) // chunk)[:, None] - np.arange(L) // chunk


def _example(rng):
    H, H_kv = [(2, 2), (2, 1)][rng.integers(2)]
    L = int(rng.integers(1, 8))
    q, k, v = (rng.normal(size=(2, n, L, 4)) for n in (H, H_kv, H_kv))
    return (q, k, v), {"chunk": 2, "context": int(rng.integers(3, 6)), "base": 100.0}


@written("dual_chunk_attention", example=_example)
def dual_chunk_attention(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B H_kv L d"],
    v: Float[Tensor, "B H_kv L d_v"],
    *,
    chunk: int,
    context: int,
    base: float = 10_000.0,
    pairing: str = "interleaved",
) -> Float[Tensor, "B H L d_v"]:
    r"""Causal rotary attention over a text longer than the training length.

    Equation: `dca-dual-chunk` one softmax over the scores of the three kinds
    Shapes: q (B, H, L, d_head), k (B, H_kv, L, d_head), v (B, H_kv, L, d_v), not yet turned -> (B, H, L, d_v)
    Raises: ValueError if the shapes do not belong together, d_head is odd or the chunk is not below the context.
    Source: notes §4.9 (heading), the second reading; An et al. 2024.
    """
    times = check_attention(q, k, v)
    L, d_head = q.shape[2], q.shape[3]
    require(k.shape[2] == L, "dual_chunk_attention", "the number of keys", f"that of queries, {L}", k)
    at = dual_chunk_positions(L, chunk, context)

    def turned(x: Tensor, positions: np.ndarray) -> Tensor:
        return rope(x, rotation_angles(positions, d_head, base), pairing)

    keys = repeat_heads(turned(k, at["key"]), times)
    same, previous, older = (scaled_scores(turned(q, at[kind]), keys) for kind in ("same", "previous", "older"))
    back = _chunks_back(L, chunk)
    scores = where(back == 0, same, where(back == 1, previous, older))  # (B, H, L, L)
    return attention_weights(scores, causal_mask(L)) @ repeat_heads(v, times)
