"""Running a reference function of `minillm` on plain arrays: its values and, by the engine, its gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minillm.autograd import Tensor, grad

Arrays = list[np.ndarray]


def evaluate(
    function: Callable, inputs: Sequence[np.ndarray], cotangents: Sequence[np.ndarray | None], dtype: Any,
    constants: Sequence[np.ndarray | None] = (), **parameters: Any,
) -> tuple[Arrays, Arrays]:  # fmt: skip
    """Values and gradients of a function of tensors, computed in ``dtype`` (float32 or float64).

    ``cotangents`` holds one array per output, None where nothing is pulled back; the gradients come one per input,
    in their order. Whatever layout or precision the arrays have, the function sees contiguous tensors of ``dtype``,
    and ``constants`` as arrays (the floating-point ones of ``dtype``).
    """
    tensors = [Tensor(np.asarray(a, dtype=dtype, order="C"), requires_grad=True) for a in inputs]
    fixed = [a.astype(dtype) if a is not None and a.dtype.kind == "f" else a for a in constants]
    outputs = function(*tensors, *fixed, **parameters)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    pairs = [(o, np.asarray(c, dtype=dtype)) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    if pairs:
        gradients = grad([o for o, _ in pairs], tensors, [c for _, c in pairs], allow_unused=True)
    else:
        gradients = [None] * len(tensors)
    values = [output.numpy() if isinstance(output, Tensor) else np.asarray(output) for output in outputs]
    return values, [
        np.zeros_like(t.numpy()) if g is None else g.numpy() for t, g in zip(tensors, gradients, strict=True)
    ]
