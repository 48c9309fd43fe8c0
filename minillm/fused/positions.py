r"""Rotary positions with the hand-derived gradient: the rotation backwards."""

import numpy as np

from minillm.autograd import scratch
from minillm.autograd.operation import derived
from minillm.functional.positions import check_rope


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, pairing: str, out: np.ndarray) -> np.ndarray:
    """Turn pairs of the last axis by angles given as cosine and sine, which broadcast; ``out`` is not x."""
    if pairing == "half":
        half = x.shape[-1] // 2
        first, second, low, high = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    else:
        first, second, low, high = x[..., 0::2], x[..., 1::2], out[..., 0::2], out[..., 1::2]
    np.multiply(first, cos, out=low)
    low -= second * sin
    np.multiply(second, cos, out=high)
    high += first * sin
    return out


@derived("rope")
def rope(x: np.ndarray, angles: np.ndarray, pairing: str = "interleaved"):
    r"""Turn pairs of coordinates by $p\,\theta_i$.

    A rotation is orthogonal, so its transpose is its inverse: $\bar x=R(-p\,\theta_i)\,\bar y$.

    Equation: `pos-rope` $R(p\,\theta_i)$ on each pair
    Shapes: x (..., L, d_head), angles (L, d_head / 2) -> (..., L, d_head); keeps cosines and sines.
    Raises: ValueError for an odd width, an unknown pairing, or angles of another shape.
    Source: notes §6.
    """
    check_rope(x, angles, pairing)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)

    def vjp(dy):
        return rotate(dy, cos, -sin, pairing, scratch.empty_like(dy))

    return rotate(x, cos, sin, pairing, scratch.empty_like(x)), vjp
