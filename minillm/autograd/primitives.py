r"""The table of primitives: forward and vector-Jacobian products side by side.

Equation: `autograd-engine` $\bar x_i=\bar y\,\partial f/\partial x_i$, one line per argument.
Source: bridging §1.6; topics #8. The table form follows the idea of mattjj/autodidact.

Each VJP is a function ``(g, out, *inputs, **params)`` of tensors: ``g`` is the cotangent of the output,
``out`` the output itself. It is written with the operations of this table, so it can be differentiated
again. A primitive marked ``broadcasts`` returns the cotangent in the stretched shape; the summing back
happens in `minillm.autograd.operation.sum_to` and nowhere else. ``None`` stands for "no gradient".
"""

from typing import Any

import numpy as np
import scipy.special

from minillm.autograd.operation import primitive
from minillm.autograd.tape import Variable

Axis = int | tuple[int, ...] | None


# ---------------------------------------------------------------------------- examples to check them at


def _normal(*shape: int):
    return lambda rng: ((rng.normal(size=shape),), {})


def _positive(*shape: int):
    return lambda rng: ((rng.uniform(0.3, 2.0, size=shape),), {})


def _apart(*shape: int):
    """Values at least 0.1 away from 0 and from one another, for functions with kinks."""

    def draw(rng):
        size = int(np.prod(shape))
        values = (0.2 + 0.2 * rng.permutation(size)) * rng.choice([-1, 1], size=size)
        return (values.reshape(shape),), {}

    return draw


def _pair(second: str = "normal"):
    """Two arrays whose shapes broadcast, one of them possibly 0-d."""
    shapes = [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 1, 3), (4, 1)), ((), (2, 2)), ((3, 1), ()), ((0, 2), (2,))]

    def draw(rng):
        left, right = shapes[rng.integers(len(shapes))]
        x = rng.normal(size=left)
        y = rng.uniform(0.5, 2.0, size=right) if second == "positive" else rng.normal(size=right)
        if second == "apart":
            y = y + np.where(rng.random(right) < 0.5, 5.0, -5.0)
        return (x, y), {}

    return draw


# ---------------------------------------------------------------------------- arithmetic, broadcasting

add = primitive(
    "add", np.add, lambda g, out, x, y: g, lambda g, out, x, y: g, broadcasts=True, example=_pair(), doc="$x+y$"
)
subtract = primitive(
    "subtract",
    np.subtract,
    lambda g, out, x, y: g,
    lambda g, out, x, y: -g,
    broadcasts=True,
    example=_pair(),
    doc="$x-y$",
)
multiply = primitive(
    "multiply",
    np.multiply,
    lambda g, out, x, y: g * y,
    lambda g, out, x, y: g * x,
    broadcasts=True,
    example=_pair(),
    doc=r"$x\odot y$",
)
divide = primitive(
    "divide",
    np.true_divide,
    lambda g, out, x, y: g / y,
    lambda g, out, x, y: -g * out / y,
    broadcasts=True,
    example=_pair("positive"),
    doc="$x/y$",
)
maximum = primitive(
    "maximum",
    np.maximum,
    lambda g, out, x, y: g * _share(x, y, np.greater),
    lambda g, out, x, y: g * _share(y, x, np.greater),
    broadcasts=True,
    example=_pair("apart"),
    doc=r"$\max(x,y)$; at a tie each argument gets half of the gradient, as in torch",
)
minimum = primitive(
    "minimum",
    np.minimum,
    lambda g, out, x, y: g * _share(x, y, np.less),
    lambda g, out, x, y: g * _share(y, x, np.less),
    broadcasts=True,
    example=_pair("apart"),
    doc=r"$\min(x,y)$; at a tie each argument gets half of the gradient, as in torch",
)
logaddexp = primitive(
    "logaddexp",
    np.logaddexp,
    lambda g, out, x, y: g * sigmoid(x - y),
    lambda g, out, x, y: g * sigmoid(y - x),
    broadcasts=True,
    example=_pair(),
    doc=r"$\log(e^x+e^y)$ without overflow",
)
power = primitive(
    "power",
    np.power,
    lambda g, out, x, y: g * _power_slope(x, y),
    lambda g, out, x, y: g * out * _log_base(x),
    broadcasts=True,
    example=lambda rng: ((rng.uniform(0.3, 2.0, size=(2, 3)), rng.normal(size=3)), {}),
    doc="$x^y$; the gradient with respect to $y$ is defined for $x>0$ and 0 elsewhere",
)
where = primitive(
    "where",
    np.where,
    None,
    lambda g, out, condition, x, y: where(condition, g, 0.0),
    lambda g, out, condition, x, y: where(condition, 0.0, g),
    broadcasts=True,
    example=lambda rng: ((rng.random((2, 3)) < 0.5, rng.normal(size=(2, 3)), rng.normal(size=3)), {}),
    doc="$x$ where the condition holds, $y$ elsewhere",
)


def _raw(x: Any) -> np.ndarray:
    return x.data if isinstance(x, Variable) else np.asarray(x)


def _constant_as_array(x: Any) -> Any:
    """A tensor without gradient as its array, which adopts the precision of what it meets."""
    return x if isinstance(x, Variable) and x.requires_grad else _raw(x)


def _share(x: Any, y: Any, better: Any) -> np.ndarray:
    """1 where x wins against y, 0 where it loses, one half at a tie."""
    x, y = _raw(x), _raw(y)
    return (better(x, y) + 0.5 * (x == y)).astype(np.result_type(x, np.float32))


def _power_slope(x: Any, y: Any) -> Any:
    """$y x^{y-1}$, and 0 where x and y are 0 (there $0\\cdot0^{-1}$ would be NaN)."""
    y = _constant_as_array(y)
    undefined = (_raw(y) == 0) & (_raw(x) == 0)
    if undefined.any():
        y_safe = where(undefined, 1.0, y) if isinstance(y, Variable) else np.where(undefined, 1.0, y)
        return y * power(x, y_safe - 1.0)
    return y * power(x, y - 1.0)


def _log_base(x: Any) -> Any:
    """$\\ln x$, and 0 where x is not positive."""
    x = _constant_as_array(x)
    positive = _raw(x) > 0
    if isinstance(x, Variable):
        return log(where(positive, x, 1.0))
    return np.log(np.where(positive, x, 1.0))


# ---------------------------------------------------------------------------- elementwise

negative = primitive("negative", np.negative, lambda g, out, x: -g, example=_normal(2, 3), doc="$-x$")
exp = primitive("exp", np.exp, lambda g, out, x: g * out, example=_normal(2, 3), doc="$e^x$")
expm1 = primitive("expm1", np.expm1, lambda g, out, x: g * (out + 1.0), example=_normal(2, 3), doc="$e^x-1$")
log = primitive("log", np.log, lambda g, out, x: g / x, example=_positive(2, 3), doc=r"$\ln x$")
log1p = primitive("log1p", np.log1p, lambda g, out, x: g / (1.0 + x), example=_positive(2, 3), doc=r"$\ln(1+x)$")
sqrt = primitive("sqrt", np.sqrt, lambda g, out, x: 0.5 * g / out, example=_positive(2, 3), doc=r"$\sqrt x$")
sin = primitive("sin", np.sin, lambda g, out, x: g * cos(x), example=_normal(2, 3), doc=r"$\sin x$")
cos = primitive("cos", np.cos, lambda g, out, x: -g * sin(x), example=_normal(2, 3), doc=r"$\cos x$")
tanh = primitive("tanh", np.tanh, lambda g, out, x: g * (1.0 - out * out), example=_normal(2, 3), doc=r"$\tanh x$")
sigmoid = primitive(
    "sigmoid",
    scipy.special.expit,
    lambda g, out, x: g * out * (1.0 - out),
    example=_normal(2, 3),
    doc=r"""Logistic function without overflow.

Equation: `sigmoid` $\sigma(x)=1/(1+e^{-x}),\ \sigma'=\sigma(1-\sigma)$
""",
)
erf = primitive(
    "erf",
    scipy.special.erf,
    lambda g, out, x: g * (2.0 / float(np.sqrt(np.pi))) * exp(-x * x),
    example=_normal(2, 3),
    doc=r"$\frac2{\sqrt\pi}\int_0^xe^{-t^2}dt$",
)
absolute = primitive(
    "absolute", np.abs, lambda g, out, x: g * np.sign(_raw(x)), example=_apart(2, 3), doc=r"$|x|$, gradient 0 at 0"
)
relu = primitive(
    "relu",
    lambda x: np.maximum(x, 0),
    lambda g, out, x: where(_raw(x) > 0, g, 0.0),
    example=_apart(2, 3),
    doc=r"""Rectified linear unit, with gradient 0 at 0 by convention.

Equation: `relu` $\max(0,x)$
""",
)
clip = primitive(
    "clip",
    lambda x, low, high: np.clip(x, low, high),
    lambda g, out, x, low, high: where(_inside(x, low, high), g, 0.0),
    example=lambda rng: (_apart(2, 3)(rng)[0], {"low": -0.5, "high": 0.75}),
    doc="$x$ limited to [low, high]; the gradient passes at the bounds themselves, as in torch",
)
astype = primitive(
    "astype",
    lambda x, dtype: x.astype(dtype),
    lambda g, out, x, dtype: astype(g, dtype=x.dtype),
    example=lambda rng: ((rng.normal(size=(2, 3)),), {"dtype": np.float64}),
    doc="$x$ in another precision; the gradient goes back in the precision of $x$",
)


def _inside(x: Any, low: float | None, high: float | None) -> np.ndarray:
    raw = _raw(x)
    return (raw >= (-np.inf if low is None else low)) & (raw <= (np.inf if high is None else high))


# ---------------------------------------------------------------------------- sums and extremes


def _restore_axes(g: Any, shape: tuple[int, ...], axis: Axis, keepdims: bool) -> Any:
    """Give a reduced value its summed axes back, with length 1."""
    if axis is None:
        return g if keepdims else reshape(g, shape=(1,) * len(shape))
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    return g if keepdims else reshape(g, shape=tuple(1 if i in axes else n for i, n in enumerate(shape)))


def _extreme_vjp(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    """Spread the gradient evenly over the entries that tie for the extreme."""
    hit = _raw(x) == _raw(_restore_axes(out, x.shape, axis, keepdims))
    share = (hit / hit.sum(axis, keepdims=True)).astype(x.dtype)
    return _restore_axes(g, x.shape, axis, keepdims) * share


def _with_axis(draw: Any):
    def example(rng):
        args, _ = draw(rng)
        axis = [None, 0, -1, (0, 2)][rng.integers(4)]
        return args, {"axis": axis, "keepdims": bool(rng.integers(2))}

    return example


sum = primitive(
    "sum",
    lambda x, axis=None, keepdims=False: np.sum(x, axis=axis, keepdims=keepdims),
    lambda g, out, x, axis=None, keepdims=False: broadcast_to(_restore_axes(g, x.shape, axis, keepdims), shape=x.shape),
    example=_with_axis(_normal(2, 3, 2)),
    doc=r"$\sum x$ over the given axes",
)
amax = primitive(
    "amax",
    lambda x, axis=None, keepdims=False: np.amax(x, axis=axis, keepdims=keepdims),
    lambda g, out, x, axis=None, keepdims=False: _extreme_vjp(g, out, x, axis, keepdims),
    example=_with_axis(_apart(2, 3, 2)),
    doc=r"$\max x$ over the given axes; ties share the gradient evenly",
)
amin = primitive(
    "amin",
    lambda x, axis=None, keepdims=False: np.amin(x, axis=axis, keepdims=keepdims),
    lambda g, out, x, axis=None, keepdims=False: _extreme_vjp(g, out, x, axis, keepdims),
    example=_with_axis(_apart(2, 3, 2)),
    doc=r"$\min x$ over the given axes; ties share the gradient evenly",
)
cumsum = primitive(
    "cumsum",
    lambda x, axis: np.cumsum(x, axis=axis),
    lambda g, out, x, axis: flip(cumsum(flip(g, axis=axis), axis=axis), axis=axis),
    example=lambda rng: ((rng.normal(size=(2, 3, 2)),), {"axis": int(rng.integers(3))}),
    doc=r"$y_i=\sum_{j\le i}x_j$ along one axis",
)


# ---------------------------------------------------------------------------- products


def _swap(x: Any) -> Any:
    return transpose(x, axes=tuple(range(x.ndim - 2)) + (x.ndim - 1, x.ndim - 2))


matmul = primitive(
    "matmul",
    np.matmul,
    lambda g, out, x, y: g @ _swap(y),
    lambda g, out, x, y: _swap(x) @ g,
    broadcasts=True,
    example=lambda rng: (
        [
            (rng.normal(size=(2, 3)), rng.normal(size=(3, 4))),
            (rng.normal(size=(2, 1, 2, 3)), rng.normal(size=(4, 3, 2))),
            (rng.normal(size=(2, 2, 3)), rng.normal(size=(3, 2))),
        ][rng.integers(3)],
        {},
    ),
    doc="Matrix product of the last two axes, the others broadcast; both arguments have at least 2 axes",
)


# ---------------------------------------------------------------------------- shapes

reshape = primitive(
    "reshape",
    lambda x, shape: np.reshape(x, shape),
    lambda g, out, x, shape: reshape(g, shape=x.shape),
    example=lambda rng: ((rng.normal(size=(2, 3)),), {"shape": (3, 2)}),
    doc="The same elements in another shape",
)
transpose = primitive(
    "transpose",
    lambda x, axes: np.transpose(x, axes),
    lambda g, out, x, axes: transpose(g, axes=tuple(int(i) for i in np.argsort(axes))),
    example=lambda rng: ((rng.normal(size=(2, 3, 4)),), {"axes": tuple(int(i) for i in rng.permutation(3))}),
    doc="Axes in another order",
)
broadcast_to = primitive(
    "broadcast_to",
    lambda x, shape: np.broadcast_to(x, shape),
    lambda g, out, x, shape: _sum_to(g, x.shape),
    example=lambda rng: ((rng.normal(size=(3, 1)),), {"shape": (2, 3, 4)}),
    doc="Stretch axes of length 1",
)
flip = primitive(
    "flip",
    lambda x, axis: np.flip(x, axis=axis),
    lambda g, out, x, axis: flip(g, axis=axis),
    example=lambda rng: ((rng.normal(size=(2, 3)),), {"axis": int(rng.integers(2))}),
    doc="One axis backwards",
)
concatenate = primitive(
    "concatenate",
    lambda *parts, axis: np.concatenate(parts, axis=axis),
    lambda g, out, *parts, axis: g,  # replaced below: which slice depends on which part
    example=lambda rng: ((rng.normal(size=(2, 1)), rng.normal(size=(2, 3))), {"axis": 1}),
    doc="Parts joined along an axis",
)


def _sum_to(g: Any, shape: tuple[int, ...]) -> Any:
    extra = g.ndim - len(shape)
    stretched = tuple(extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1)
    axes = tuple(range(extra)) + stretched
    return reshape(sum(g, axis=axes) if axes else g, shape=shape)


def _concatenate_pull(node, slots, create_graph):
    """Cut the cotangent into the slices that the parts occupy."""
    from_axis = node.params["axis"]
    edges = np.cumsum([0] + [part.shape[from_axis] for part in node.inputs])
    g = slots[0]
    pulled = []
    for part, start, stop in zip(node.inputs, edges[:-1], edges[1:], strict=True):
        index = [slice(None)] * len(g.shape)
        index[from_axis] = slice(int(start), int(stop))
        pulled.append(g[tuple(index)] if getattr(part, "requires_grad", False) else None)
    return pulled


concatenate.pull = _concatenate_pull

# ---------------------------------------------------------------------------- selection


def _scatter_add(values: np.ndarray, shape: tuple[int, ...], index: Any) -> np.ndarray:
    out = np.zeros(shape, dtype=values.dtype)
    parts = index if isinstance(index, tuple) else (index,)
    if all(isinstance(part, int | np.integer | slice) or part is None or part is Ellipsis for part in parts):
        out[index] = values  # basic indexing names every element at most once
    else:
        np.add.at(out, index, values)
    return out


getitem = primitive(
    "getitem",
    lambda x, index: x[index],
    lambda g, out, x, index: scatter_add(g, shape=x.shape, index=index),
    example=lambda rng: (
        (rng.normal(size=(4, 3)),),
        {
            "index": [np.s_[1:3], np.s_[::-1, 0], np.array([0, 2, 2]), (np.array([1, 1]), np.array([0, 2]))][
                rng.integers(4)
            ]
        },
    ),
    doc="Elements picked by any NumPy index",
)
scatter_add = primitive(
    "scatter_add",
    _scatter_add,
    lambda g, out, values, shape, index: getitem(g, index=index),
    example=lambda rng: ((rng.normal(size=(3, 2)),), {"shape": (4, 2), "index": np.array([0, 2, 2])}),
    doc="Zeros of a shape with values added at an index; repeated places add up",
)
gather = primitive(
    "gather",
    lambda x, index, axis: np.take_along_axis(x, index, axis=axis),
    lambda g, out, x, index, axis: scatter_along(g, shape=x.shape, index=index, axis=axis),
    example=lambda rng: ((rng.normal(size=(3, 4)),), {"index": rng.integers(4, size=(3, 2)), "axis": 1}),
    doc="$y_{ij}=x_{i,\\mathrm{index}_{ij}}$ along one axis",
)


def _scatter_along(values: np.ndarray, shape: tuple[int, ...], index: np.ndarray, axis: int) -> np.ndarray:
    places: list[np.ndarray] = list(np.indices(shape, sparse=True))
    places[axis] = index
    return _scatter_add(values, shape, tuple(places))


scatter_along = primitive(
    "scatter_along",
    _scatter_along,
    lambda g, out, values, shape, index, axis: gather(g, index=index, axis=axis),
    example=lambda rng: (
        (rng.normal(size=(3, 2)),),
        {"shape": (3, 4), "index": rng.integers(4, size=(3, 2)), "axis": 1},
    ),
    doc="The transpose of gather: values added at the gathered places",
)
