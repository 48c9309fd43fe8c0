"""PyTorch on the CPU as an opinion about every primitive: its twin, its values, its gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tests.forms import Evaluation, is_float_array


def evaluate(
    function: Callable, args: Sequence[Any], kwargs: dict, cotangents: Sequence[np.ndarray] | None
) -> Evaluation:
    """Run a torch function forward and backward on arrays; without cotangents only forward."""
    given = [
        torch.tensor(np.ascontiguousarray(x).reshape(np.shape(x)), requires_grad=True) if is_float_array(x) else x
        for x in args
    ]
    result = function(*given, **kwargs)
    outputs = list(result) if isinstance(result, tuple | list) else [result]
    values = [o.detach().numpy() for o in outputs]
    if cotangents is None:
        return Evaluation(values, [])
    wanted = [t for t in given if isinstance(t, torch.Tensor)]
    seeds = [torch.tensor(np.ascontiguousarray(c).reshape(c.shape)) for c in cotangents]
    found = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
    gradients = [np.zeros(t.shape) if g is None else g.numpy() for t, g in zip(wanted, found, strict=True)]
    return Evaluation(values, gradients)


def _places(shape: tuple[int, ...], index: Any) -> torch.Tensor:
    """The flat positions that a NumPy index picks, since torch has no negative steps."""
    return torch.from_numpy(np.array(np.arange(int(np.prod(shape))).reshape(shape)[index]))


def _pick(x, index):
    return x.reshape(-1)[_places(tuple(x.shape), index)]


def _scatter(values, shape, index):
    places = _places(shape, index)
    flat = torch.zeros(int(np.prod(shape)), dtype=values.dtype)
    return flat.index_add(0, places.reshape(-1), values.reshape(-1)).reshape(shape)


def _reduce(name: str) -> Callable:
    def reduce(x, axis=None, keepdims=False):
        every = tuple(range(x.dim())) if axis is None else axis
        if every == ():
            return x.clone()
        return getattr(torch, name)(x, dim=every, keepdim=keepdims)

    return reduce


def _index(index: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(index))


TWINS: dict[str, Callable] = {
    "add": torch.add,
    "subtract": torch.subtract,
    "multiply": torch.multiply,
    "divide": torch.divide,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "logaddexp": torch.logaddexp,
    "power": torch.pow,
    "where": lambda condition, x, y: torch.where(torch.as_tensor(condition), x, y),
    "negative": torch.negative,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "absolute": torch.abs,
    "relu": torch.relu,
    "clip": lambda x, low, high: torch.clamp(x, low, high),
    "astype": lambda x, dtype: x.to(torch.from_numpy(np.zeros(1, dtype)).dtype),
    "sum": _reduce("sum"),
    "amax": _reduce("amax"),
    "amin": _reduce("amin"),
    "cumsum": lambda x, axis: torch.cumsum(x, dim=axis),
    "matmul": torch.matmul,
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": lambda x, axes: x.permute(axes),
    "broadcast_to": lambda x, shape: torch.broadcast_to(x, shape),
    "flip": lambda x, axis: torch.flip(x, dims=(axis,)),
    "concatenate": lambda *parts, axis: torch.cat(parts, dim=axis),
    "getitem": _pick,
    "scatter_add": _scatter,
    "gather": lambda x, index, axis: torch.gather(x, axis, _index(index)),
    "scatter_along": lambda values, shape, index, axis: torch.zeros(shape, dtype=values.dtype).scatter_add(
        axis, _index(index), values
    ),
    "alias": lambda x: x.clone(),
}
