"""The truth for this family: the gated units of `minillm.functional`, on one joint projection or on its two halves."""

from minillm.autograd import Tensor, cat
from minillm.functional import activations


def swiglu(h: Tensor) -> Tensor:
    """h (..., 2 d_ff) = [value; gate] -> (..., d_ff)."""
    return activations.swiglu(h)


def geglu(h: Tensor) -> Tensor:
    """h (..., 2 d_ff) = [value; gate] -> (..., d_ff)."""
    return activations.geglu(h)


def swiglu_pair(value: Tensor, gate: Tensor) -> Tensor:
    """value (..., d_ff), gate (..., d_ff) -> (..., d_ff)."""
    return activations.swiglu(cat([value, gate], axis=-1))


def geglu_pair(value: Tensor, gate: Tensor) -> Tensor:
    """value (..., d_ff), gate (..., d_ff) -> (..., d_ff)."""
    return activations.geglu(cat([value, gate], axis=-1))
