r"""What a loss takes as given: frozen arrays and masks.

Rewards, advantages, behaviour and reference log-probs are data. They enter every loss through `frozen`, so
that no gradient can leak into them, even when the caller passes the live log-probs twice.
"""

from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.checks import require

Array = Tensor | np.ndarray


def frozen(value: Any) -> np.ndarray:
    r"""The plain array behind a tensor or an array: values without a graph.

    Equation: `stop-gradient` $\mathrm{sg}[x]=x,\ \partial\,\mathrm{sg}[x]=0$
    Shapes: any; not copied.
    Source: lecture06 (critic).
    """
    return value.data if isinstance(value, Tensor) else np.asarray(value)


def kept_positions(mask: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Turn a mask of booleans, zeros and ones into booleans; refuse any other value or shape."""
    array = frozen(mask)
    require(array.shape == tuple(shape), where, "the mask", f"of the terms' shape {tuple(shape)}", array)
    if array.dtype.kind == "b":
        return array
    odd = array[(array != 0) & (array != 1)]
    require(odd.size == 0, where, "the mask", "of booleans, zeros and ones", f"the value {odd[:1]}")
    return array == 1


def frozen_where(keep: np.ndarray, value: Any, where: str, what: str) -> np.ndarray:
    """Freeze data of the mask's shape, or one number for each of its rows, and put 0 where it is dropped."""
    array = frozen(value)
    if array.shape == keep.shape[:-1] and keep.ndim:
        array = array[..., None]  # (B, 1): one number for all tokens of a response
    fits = array.shape == keep.shape or array.shape == (*keep.shape[:-1], 1)
    require(fits, where, what, f"of shape {keep.shape} or {keep.shape[:-1]}", array)
    return np.where(keep, array, 0)
