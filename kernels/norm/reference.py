"""The truth for this family: the norms of `minillm.functional`, composed where the kernel fuses more than one.

All take and return `minillm` tensors; `kernels.evaluate` brings arrays of any dtype to the precision wanted and
runs the engine's gradient. A reader's own kernel has these signatures on torch tensors (`--impl`).
"""

from minillm.autograd import Tensor
from minillm.functional import norms


def rms_norm(x: Tensor, g: Tensor, eps: float = 1e-6) -> Tensor:
    """x (..., d), g (d,) -> (..., d)."""
    return norms.rms_norm(x, g, eps)


def layer_norm(x: Tensor, g: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """x (..., d), g (d,), b (d,) -> (..., d)."""
    return norms.layer_norm(x, g, b, eps)


def add_rms_norm(x: Tensor, r: Tensor, g: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x (..., d), r (..., d), g (d,) -> s (..., d), y (..., d)."""
    return norms.add_rms_norm(x, r, g, eps)


def add_layer_norm(x: Tensor, r: Tensor, g: Tensor, b: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x (..., d), r (..., d), g (d,), b (d,) -> s (..., d), y (..., d)."""
    s = x + r
    return s, norms.layer_norm(s, g, b, eps)
