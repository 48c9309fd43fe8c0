r"""The two kinds of operation that the tape knows: primitives and derived forms.

A `Primitive` is a NumPy function beside one vector-Jacobian product (VJP) per argument. For
$y=f(x_1,\dots,x_n)$ and a cotangent $\bar y$, the $i$-th VJP returns
$\bar x_i=\bar y\,\partial f/\partial x_i$, written with tensor operations.

A `Derived` form is a NumPy function that returns its value together with a closure
``vjp(cotangents...) -> gradients...`` over whatever it chose to keep. If it has a parameter ``wanted``, it is told
which of its arguments need a gradient.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from minillm.autograd import registry
from minillm.autograd.tape import Node, Variable, is_recording, propagate, wrap
from minillm.checks import describe, message


def sum_to(cotangent: Any, shape: tuple[int, ...]) -> Any:
    """Undo broadcasting: sum a cotangent over the axes along which its value was stretched.

    This is the only place where that happens. Works on arrays and on tensors.
    """
    if cotangent.shape == shape:
        return cotangent
    extra = len(cotangent.shape) - len(shape)
    stretched = tuple(extra + i for i, n in enumerate(shape) if n == 1 and cotangent.shape[extra + i] != 1)
    summed = cotangent.sum(tuple(range(extra)) + stretched) if extra or stretched else cotangent
    return summed.reshape(shape)


class Primitive:
    """One row of the primitive table: a forward function on arrays and its VJPs on tensors."""

    def __init__(self, name: str, forward: Callable, vjps: tuple[Callable | None, ...], broadcasts: bool, doc: str):
        self.name, self.forward, self.vjps, self.broadcasts = name, forward, vjps, broadcasts
        self.__name__ = self.__qualname__ = name
        self.__doc__ = doc

    def __repr__(self) -> str:
        return f"<primitive {self.name}>"

    def __call__(self, *args: Any, **params: Any) -> Any:
        if len(args) > 1:
            args = _same_precision(self.name, args)
        arrays = [a.data if isinstance(a, Variable) else a for a in args]
        try:
            data = self.forward(*arrays, **params)
        except (ValueError, IndexError) as error:
            shapes = ", ".join(str(np.shape(a)) for a in arrays)
            raise type(error)(f"{self.name}: cannot work on shapes {shapes}: {error}") from None
        if data.dtype != _DEFAULT and data.dtype.kind == "f" and "dtype" not in params:
            data = _without_upcast(data, arrays)
        out = wrap(data)
        if is_recording() and any(isinstance(a, Variable) and a.requires_grad for a in args):
            out.requires_grad = True
            out.node = Node(self, args, params, out.data)
        return out

    def pull(self, node: Node, slots: list, create_graph: bool) -> list:
        """Map the output's cotangent to one cotangent per input (None where none is needed)."""
        cotangent = slots[0] if create_graph else wrap(slots[0])
        out = wrap(node.output)
        if create_graph:
            out.requires_grad, out.node = True, node
        pulled: list[Any] = []
        for value, vjp in zip(node.inputs, self.vjps if len(self.vjps) > 1 else self.vjps * len(node.inputs)):
            if vjp is None or not getattr(value, "requires_grad", False):
                pulled.append(None)
                continue
            gradient = vjp(cotangent, out, *node.inputs, **node.params)
            if self.broadcasts:
                gradient = sum_to(gradient, value.shape)
            pulled.append(gradient if create_graph else gradient.data)
        return pulled + [None] * (len(node.inputs) - len(pulled))


_DEFAULT = np.dtype(np.float32)


def _without_upcast(data: Any, arrays: list) -> Any:
    """Bring to float32 what NumPy made float64 of integers, booleans and Python numbers alone."""
    made_from_floats = any(getattr(a, "dtype", _DEFAULT) == data.dtype for a in arrays)
    return data if made_from_floats else data.astype(_DEFAULT)


def _precision(name: str, args: tuple) -> np.dtype | None:
    """The one precision of the float tensors among the arguments; two of different precision are refused."""
    dtypes = {a.data.dtype for a in args if isinstance(a, Variable) and a.data.dtype.kind == "f"}
    if len(dtypes) > 1:
        raise TypeError(
            f"{name}: tensors of one precision are wanted, got {' and '.join(sorted(map(str, dtypes)))}. "
            "Convert one of them with .float() or .double()."
        )
    return dtypes.pop() if dtypes else None


def _one_precision(name: str, args: tuple) -> tuple:
    """Bring floating-point constant arrays to the precision of the tensors; leave indices and masks alone."""
    dtype = _precision(name, args)
    if dtype is None:
        return args
    return tuple(a.astype(dtype, copy=False) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args)


def _same_precision(name: str, args: tuple) -> tuple:
    """Bring every constant, integer tensors included, to the precision of the float tensors."""
    dtype = _precision(name, args)
    if dtype is None:
        return args

    def adapt(a: Any) -> Any:
        if isinstance(a, Variable):
            return a if a.data.dtype.kind in "fb" else wrap(a.data.astype(dtype))
        if isinstance(a, bool | int | float):
            return float(a) if isinstance(a, float) else a  # a Python number (np.float64 too) adopts the precision
        array = np.asarray(a)
        if array.dtype.kind not in "biuf":
            raise TypeError(message(name, "an argument", "a tensor, an array or a number", describe(a)))
        return array if array.dtype.kind == "b" else array.astype(dtype, copy=False)

    return tuple(adapt(a) for a in args)


def primitive(name: str, forward: Callable, *vjps: Callable | None, broadcasts: bool = False, doc: str = "", **row):
    """Make a primitive and enter it in the registry; further keywords go to `registry.register`."""
    made = Primitive(name, forward, vjps, broadcasts, doc)
    registry.register(name, primitive=made, **row)
    return made


alias = primitive(
    "alias",
    lambda x: x,
    lambda g, out, x: g,
    example=lambda rng: ((rng.normal(size=(2, 3)),), {}),
    doc="The same values under another name: a place in the graph where a gradient can be read off",
)


class Derived:
    """A fused form: arrays in, value and hand-derived VJP closure out, one node on the tape."""

    def __init__(self, name: str, function: Callable):
        self.name, self.arrays = name, function
        self.__name__, self.__qualname__ = function.__name__, function.__qualname__
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        self.__wrapped__ = function
        self.asks = "wanted" in inspect.signature(function).parameters

    def __repr__(self) -> str:
        return f"<derived {self.name}>"

    def __call__(self, *args: Any, **params: Any) -> Any:
        args = _one_precision(self.name, args)
        wanted = tuple(isinstance(a, Variable) and a.requires_grad for a in args)
        record = is_recording() and any(wanted)
        more = {"wanted": wanted} if self.asks else {}
        value, vjp = self.arrays(*[a.data if isinstance(a, Variable) else a for a in args], **params, **more)
        if not isinstance(value, tuple):
            out = wrap(value)
            if record:
                out.requires_grad, out.node = True, Node(self, args, params, vjp=vjp)
            return out
        outs = tuple(wrap(v) for v in value)
        if record:
            node = Node(self, args, params, vjp=vjp, n_outputs=len(outs))
            for index, out in enumerate(outs):
                out.requires_grad, out.node, out.index = True, node, index
        return outs

    def pull(self, node: Node, slots: list, create_graph: bool) -> Any:
        """Map cotangents to gradients by the hand-derived VJP, or through the as-written form."""
        if not create_graph and node.vjp is not None:
            gradients = node.vjp(*slots)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            return gradients + (None,) * (len(node.inputs) - len(gradients))
        return self._pull_through_written(node, slots)

    def _twin(self) -> Callable:
        """The as-written form of the same function."""
        written = registry.row(self.name).written
        if written is None:
            raise RuntimeError(f"{self.name}: gradients of gradients need an as-written form, and there is none.")
        return written

    def _pull_through_written(self, node: Node, slots: list) -> list:
        """Differentiate the as-written twin, whose VJPs are primitives, so that gradients have a graph.

        The twin is given aliases, and the walk stops there: an input that another input was made from (the
        stream and its branch in a residual block) must receive its own share here, and not the other's too.
        """
        inputs = [alias(t) if getattr(t, "requires_grad", False) else t for t in node.inputs]
        outputs = self._twin()(*inputs, **node.params)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, s) for o, s in zip(outputs, slots, strict=True) if s is not None and o.requires_grad]
        taps = [t for t in inputs if getattr(t, "requires_grad", False)]
        found = propagate(
            [o for o, _ in pairs],
            [s for _, s in pairs],
            retain_graph=True,
            create_graph=True,
            taps=taps,
            stop_at_taps=True,
        )
        return [found.get(id(t)) for t in inputs]


def derived(name: str) -> Callable[[Callable], Derived]:
    """Enter a fused function in the registry as the derived form of ``name`` and make it callable on tensors."""

    def enter(function: Callable) -> Derived:
        made = Derived(name, function)
        registry.register(name, derived=made)
        return made

    return enter
