r"""Absolute positions: what is added to the stream before the first block."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.linear import embedding


def sinusoidal_positions(positions: Int[np.ndarray, "*L"], d: int, base: float = 10_000.0) -> Float[np.ndarray, "*L d"]:
    r"""Sines and cosines of many wavelengths.

    Equation: `pos-sinusoidal` $\mathrm{PE}_{p,2i}=\sin(p\,b^{-2i/d}),\ \mathrm{PE}_{p,2i+1}=\cos(p\,b^{-2i/d})$
    Shapes: positions (...,) -> (..., d), float64
    Raises: ValueError for an odd width or a base that is not above 1.
    Source: notes §6; Vaswani et al. 2017.
    """
    require_positive(d, "sinusoidal_positions", "d", integer=True)
    require(d % 2 == 0, "sinusoidal_positions", "d", "an even number (sines and cosines in pairs)", d)
    require(base > 1, "sinusoidal_positions", "the base", "above 1", base)
    angles = np.asarray(positions, dtype=np.float64)[..., None] * base ** (-2.0 * np.arange(d // 2) / d)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(*angles.shape[:-1], d)


def check_positions(where: str, positions: np.ndarray, L: int, capacity: int | None = None) -> np.ndarray:
    """Refuse positions that are not integers from 0, one for each of L tokens, below the capacity."""
    positions = np.asarray(positions)
    fits = positions.dtype.kind in "iu" and positions.ndim in (1, 2) and positions.shape[-1] == L
    require(fits, where, "positions", f"integers of shape (L,) or (B, L) with L = {L}", positions)
    if positions.size:
        low, high = int(positions.min()), int(positions.max())
        inside = low >= 0 and (capacity is None or high < capacity)
        wanted = "non-negative" if capacity is None else f"in [0, {capacity})"
        require(inside, where, "positions", wanted, f"{low}..{high}", error=IndexError)
    return positions


def _example(rng):
    positions = [np.arange(3), np.array([2, 0, 2]), np.array([[0, 1, 2], [3, 3, 0]])][rng.integers(3)]
    return (rng.normal(size=(2, 3, 4)), rng.normal(size=(5, 4))), {"positions": positions}


@written("add_learned_positions", example=_example)
def add_learned_positions(
    x: Float[Tensor, "B L d"], w_pos: Float[Tensor, "L_max d"], positions: Any
) -> Float[Tensor, "B L d"]:
    r"""Add a learnt vector for each position.

    Equation: `pos-learned` $\mathbf X\leftarrow\mathbf X+\mathbf W_{\rm pos}[0{:}L]$
    Shapes: x (B, L, d), w_pos (L_max, d), positions (L,) or (B, L) -> (B, L, d)
    Raises: ValueError for positions of another length, IndexError for one outside [0, L_max).
    Source: notes §6.
    """
    fits = w_pos.ndim == 2 and w_pos.shape[1] == x.shape[-1]
    require(fits, "add_learned_positions", "w_pos", f"of shape (L_max, {x.shape[-1]})", w_pos)
    return x + embedding(check_positions("add_learned_positions", positions, x.shape[1], w_pos.shape[0]), w_pos)
