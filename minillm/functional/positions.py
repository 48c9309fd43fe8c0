r"""Positions: rotary angles and the rotation of queries and keys."""

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor, cat, stack
from minillm.autograd.registry import written
from minillm.checks import require, require_one_of

PAIRINGS = ("interleaved", "half")


def rotation_angles(positions: np.ndarray, d_head: int, base: float = 10_000.0) -> Float[np.ndarray, "L half"]:
    r"""Angles $p\,\theta_i$ by which the pairs of a head turn at each position.

    Equation: `pos-rope` $\theta_i=b^{-2i/d_{\rm head}},\ i=0..\frac{d_{\rm head}}2-1$
    Shapes: positions (L,), counted from 0 -> (L, d_head / 2), in radians, float64
    Raises: ValueError for an odd d_head or a base that is not above 1.
    Source: notes §6; Su et al. 2021.
    """
    require(d_head > 0 and d_head % 2 == 0, "rotation_angles", "d_head", "a positive even number (pairs turn)", d_head)
    require(base > 1, "rotation_angles", "the base", "above 1", base)
    frequencies = base ** (-2.0 * np.arange(d_head // 2) / d_head)
    return np.asarray(positions, dtype=np.float64)[:, None] * frequencies


def check_rope(x, angles, pairing: str) -> None:
    """Refuse angles that do not fit the length and the head width of x."""
    require_one_of(pairing, PAIRINGS, "rope", "pairing")
    require(x.ndim >= 2 and x.shape[-1] % 2 == 0, "rope", "x", "(..., L, d_head) with an even d_head", x)
    wanted = (x.shape[-2], x.shape[-1] // 2)
    require(angles.shape == wanted, "rope", "the angles", f"of shape (L, d_head / 2) = {wanted}", angles)


def _example(rng):
    shape = [(2, 3, 4), (1, 2), (2, 2, 3, 6)][rng.integers(3)]
    angles = rotation_angles(np.arange(shape[-2]) + rng.integers(5), shape[-1], 100.0)
    return (rng.normal(size=shape),), {"angles": angles, "pairing": PAIRINGS[rng.integers(2)]}


@written("rope", example=_example)
def rope(
    x: Float[Tensor, "*B L d_head"], angles: Float[np.ndarray, "L half"], pairing: str = "interleaved"
) -> Float[Tensor, "*B L d_head"]:
    r"""Turn pairs of coordinates by an angle that grows with the position.

    Equation: `pos-rope` $\begin{pmatrix}q_{2i}'\\q_{2i+1}'\end{pmatrix}=R(p\,\theta_i)\begin{pmatrix}q_{2i}\\q_{2i+1}\end{pmatrix}$
    Shapes: x (..., L, d_head), angles (L, d_head / 2) -> (..., L, d_head)
    Raises: ValueError for an odd width, an unknown pairing, or angles of another shape.
    Source: notes §6; Su et al. 2021.
    Differs: pairing "interleaved" turns (2i, 2i+1), as the paper; "half" turns (i, i + d_head/2), as the LLaMA
        weights on the hub. The two differ by a fixed permutation of the coordinates.
    """
    check_rope(x, angles, pairing)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)  # (L, d_head / 2)
    if pairing == "half":
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        return cat([first * cos - second * sin, second * cos + first * sin], axis=-1)
    first, second = x[..., 0::2], x[..., 1::2]
    turned = stack([first * cos - second * sin, second * cos + first * sin], axis=-1)  # (..., L, d_head / 2, 2)
    return turned.reshape(x.shape)
