"""Running a reference function of `minillm` on plain arrays: its values and, by the engine, its gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minillm.autograd import Tensor, grad

Arrays = list[np.ndarray]


def evaluate(
    function: Callable, inputs: Sequence[np.ndarray], cotangents: Sequence[np.ndarray], dtype: Any, **parameters: Any
) -> tuple[Arrays, Arrays]:
    """Values and gradients of a function of tensors, computed in ``dtype`` (float32 or float64).

    ``cotangents`` holds one array per output; the gradients come one per input, in their order. Whatever
    layout or precision the arrays have, the function sees contiguous tensors of ``dtype``.
    """
    tensors = [Tensor(np.ascontiguousarray(a, dtype=dtype), requires_grad=True) for a in inputs]
    outputs = function(*tensors, **parameters)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    seeds = [np.ascontiguousarray(c, dtype=dtype) for c in cotangents]
    gradients = grad(outputs, tensors, seeds, allow_unused=True)
    values = [output.numpy() for output in outputs]
    return values, [
        np.zeros_like(t.numpy()) if g is None else g.numpy() for t, g in zip(tensors, gradients, strict=True)
    ]
