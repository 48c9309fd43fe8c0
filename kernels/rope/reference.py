"""The truth for this family: `minillm.functional.positions.rope` at the angles that a table of cosines and sines stands for."""

import numpy as np

from minillm.autograd import Tensor, stack
from minillm.functional import positions as written


def rope(
    x: Tensor, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray | None = None, start: int = 0,
    pairing: str = "interleaved",
) -> Tensor:  # fmt: skip
    """x (..., L, d_head), cos and sin (n, d_head / 2), positions None, (L,) or (B, L) -> (..., L, d_head)."""
    rows = np.arange(x.shape[-2]) if positions is None else positions
    angles = np.arctan2(sin, cos)[rows + start]  # (L, d_head / 2) or (B, L, d_head / 2)
    if angles.ndim == 2:
        return written.rope(x, angles, pairing)
    return stack([written.rope(x[i], angles[i], pairing) for i in range(len(x))], axis=0)
