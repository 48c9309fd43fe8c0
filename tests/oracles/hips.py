"""HIPS autograd as another opinion about the primitives: a second engine over NumPy, by other people."""

from collections.abc import Callable, Sequence
from typing import Any

import autograd.numpy as anp
import autograd.scipy.special as special
import numpy as np
from autograd import make_vjp

from tests.forms import Evaluation, is_float_array


def evaluate(function: Callable, args: Sequence[Any], kwargs: dict, cotangent: np.ndarray) -> Evaluation:
    """Run a function of autograd.numpy forward and backward on arrays; one result, one cotangent."""
    slots = [i for i, x in enumerate(args) if is_float_array(x)]

    def of_floats(floats):
        given = list(args)
        for i, x in zip(slots, floats):
            given[i] = x
        return function(*given, **kwargs)

    vjp, value = make_vjp(of_floats)(tuple(np.asarray(args[i]) for i in slots))
    return Evaluation([np.asarray(value)], [np.asarray(g) for g in vjp(cotangent)])


def _scatter(values, shape, index):
    """Zeros with values added at an index, as a product with a matrix of zeros and ones."""
    places = np.arange(int(np.prod(shape))).reshape(shape)[index]
    matrix = np.zeros((int(np.prod(shape)), places.size))
    matrix[places.reshape(-1), np.arange(places.size)] = 1
    return anp.reshape(anp.dot(matrix, anp.reshape(values, (-1,))), shape)


def _along(shape: tuple[int, ...], index: np.ndarray, axis: int) -> tuple:
    places: list[np.ndarray] = list(np.indices(index.shape))
    places[axis] = index
    return tuple(places)


def _where(condition, x, y):
    """Stretched first, since the library's own `where` does not undo a broadcast."""
    ones = np.ones(np.broadcast_shapes(np.shape(condition), x.shape, y.shape))
    return anp.where(condition, x * ones, y * ones)


def _reversed(x, axis):
    index = [slice(None)] * x.ndim
    index[axis] = slice(None, None, -1)
    return x[tuple(index)]


TWINS: dict[str, Callable] = {
    "add": anp.add,
    "subtract": anp.subtract,
    "multiply": anp.multiply,
    "divide": anp.true_divide,
    "maximum": anp.maximum,
    "minimum": anp.minimum,
    "logaddexp": anp.logaddexp,
    "power": anp.power,
    "where": _where,
    "negative": anp.negative,
    "exp": anp.exp,
    "expm1": anp.expm1,
    "log": anp.log,
    "log1p": anp.log1p,
    "sqrt": anp.sqrt,
    "sin": anp.sin,
    "cos": anp.cos,
    "tanh": anp.tanh,
    "sigmoid": special.expit,
    "erf": special.erf,
    "absolute": anp.abs,
    "relu": lambda x: anp.where(x > 0, x, 0.0),
    "clip": lambda x, low, high: anp.clip(x, low, high),
    "astype": lambda x, dtype: x.astype(dtype),
    "sum": anp.sum,
    "amax": anp.max,
    "amin": anp.min,
    "cumsum": anp.cumsum,
    "matmul": anp.matmul,
    "reshape": anp.reshape,
    "transpose": anp.transpose,
    "broadcast_to": lambda x, shape: x * np.ones(shape),
    "flip": _reversed,
    "concatenate": lambda *parts, axis: anp.concatenate(parts, axis=axis),
    "getitem": lambda x, index: x[index],
    "scatter_add": _scatter,
    "gather": lambda x, index, axis: x[_along(x.shape, index, axis)],
    "scatter_along": lambda values, shape, index, axis: _scatter(values, shape, _along(shape, index, axis)),
    "alias": lambda x: x * 1.0,
}
