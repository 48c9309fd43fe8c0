"""The autograd engine: tensors, primitives with their VJPs, the tape, and the gradient check."""

from minillm.autograd.gradcheck import GradientError, gradcheck
from minillm.autograd.tape import grad, is_recording, no_grad
from minillm.autograd.tensor import Tensor, arange, as_tensor, cat, matmul, ones, stack, where, zeros

__all__ = [
    "GradientError",
    "Tensor",
    "arange",
    "as_tensor",
    "cat",
    "grad",
    "gradcheck",
    "is_recording",
    "matmul",
    "no_grad",
    "ones",
    "stack",
    "where",
    "zeros",
]
