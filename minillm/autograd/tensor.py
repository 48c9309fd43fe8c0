"""The tensor: an array that remembers where it came from, under the names PyTorch users expect."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minillm.autograd import primitives as ops
from minillm.autograd import tape
from minillm.autograd.tape import Variable
from minillm.checks import message, require

Axis = int | tuple[int, ...] | None
Limit = float | None  # inside the class, `float` is the method
Number = float


class Tensor(Variable):
    r"""An n-dimensional array with a place in the computation graph.

    Equation: `autograd-engine` $\bar u=\sum_{v\in\mathrm{succ}(u)}\bar v\,\partial v/\partial u$
    Shapes: any, 0-d and empty included. Elements are float32 or float64, integers or booleans.
    Raises: TypeError for other dtypes, or for requires_grad=True on integers and booleans.
    Source: bridging §1.6.

    Python numbers and lists become float32 (or int64, bool); NumPy arrays keep their dtype and are not
    copied. Two float tensors of different precision do not mix: nothing is upcast silently.
    """

    __slots__ = ()
    __array_ufunc__ = None  # so that array + tensor comes to Tensor.__radd__

    def __init__(self, data: Any, requires_grad: bool = False, dtype: Any = None):
        if isinstance(data, Variable):
            data = data.data
        from_numpy = isinstance(data, np.ndarray | np.generic)
        array = np.asarray(data)
        if dtype is not None:
            array = array.astype(dtype, copy=False)
        elif array.dtype == np.float64 and not from_numpy:
            array = array.astype(np.float32)
        if array.dtype not in _DTYPES and array.dtype.kind not in "iub":
            raise TypeError(
                message("Tensor", "the elements", "float32, float64, integers or booleans", f"{array.dtype}")
                + " Pass dtype=np.float32 to convert."
            )
        if requires_grad and array.dtype.kind != "f":
            raise TypeError(
                message("Tensor", "the elements", "floating point when requires_grad=True", f"{array.dtype}")
            )
        self.data = array
        self.grad = None
        self.requires_grad = requires_grad
        self.node = None
        self.index = 0

    # ---- what it is

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.data.size

    @property
    def is_leaf(self) -> bool:
        """Whether it was made by the user and not by an operation."""
        return self.node is None

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError(message("Tensor", "the tensor", "of at least 1 axis to have a length", self))
        return self.shape[0]

    def __iter__(self) -> Iterator["Tensor"]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.requires_grad:
            raise TypeError(
                "Tensor: NumPy functions do not record, and this tensor requires a gradient. "
                "Use the tensor's own operations, or .detach() to leave the graph."
            )
        return np.array(self.data, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        values = np.array2string(self.data, precision=4, threshold=20, edgeitems=3)
        origin = f", from={self.node.operation.name}" if self.node is not None else ""
        needs = ", requires_grad=True" if self.requires_grad and self.node is None else ""
        gap = "\n" if "\n" in values else " "
        return f"Tensor(shape={self.shape}, dtype={self.dtype}{needs}{origin},{gap}{values})"

    def __bool__(self) -> bool:
        return bool(self.data)

    def __float__(self) -> Number:
        return Number(self.data)

    def __int__(self) -> int:
        return int(self.data)

    __hash__ = object.__hash__

    # ---- the graph

    def backward(self, gradient: Any = None, *, retain_graph: bool | None = None, create_graph: bool = False) -> None:
        """Add the gradient of this tensor to ``.grad`` of every leaf behind it; see `tape.backward`."""
        tape.backward(self, gradient, retain_graph=retain_graph, create_graph=create_graph)

    def detach(self) -> "Tensor":
        r"""The same values, cut off from the graph: a constant.

        Equation: `stop-gradient` $\mathrm{sg}[x]=x,\ \partial\,\mathrm{sg}[x]=0$
        Shapes: any; the array is shared, not copied.
        Source: lecture06 (critic).
        """
        return tape.wrap(self.data)

    def numpy(self) -> np.ndarray:
        """The array itself, shared with the tensor."""
        return self.data

    def item(self) -> Any:
        """The only element as a Python number."""
        if self.size != 1:
            raise ValueError(message("Tensor.item", "the tensor", "of one element", self))
        return self.data.item()

    def tolist(self) -> Any:
        """The values as nested Python lists."""
        return self.data.tolist()

    def clone(self) -> "Tensor":
        """A copy that passes gradients on to the original."""
        return self * 1.0 if self.dtype.kind == "f" else tape.wrap(self.data.copy())

    def float(self) -> "Tensor":
        """The same in float32."""
        return ops.astype(self, dtype=np.dtype(np.float32))

    def double(self) -> "Tensor":
        """The same in float64."""
        return ops.astype(self, dtype=np.dtype(np.float64))

    # ---- arithmetic

    def __add__(self, other: Any) -> "Tensor":
        return ops.add(self, other)

    def __radd__(self, other: Any) -> "Tensor":
        return ops.add(other, self)

    def __sub__(self, other: Any) -> "Tensor":
        return ops.subtract(self, other)

    def __rsub__(self, other: Any) -> "Tensor":
        return ops.subtract(other, self)

    def __mul__(self, other: Any) -> "Tensor":
        return ops.multiply(self, other)

    def __rmul__(self, other: Any) -> "Tensor":
        return ops.multiply(other, self)

    def __truediv__(self, other: Any) -> "Tensor":
        return ops.divide(self, other)

    def __rtruediv__(self, other: Any) -> "Tensor":
        return ops.divide(other, self)

    def __pow__(self, other: Any) -> "Tensor":
        return ops.power(self, other)

    def __rpow__(self, other: Any) -> "Tensor":
        return ops.power(other, self)

    def __neg__(self) -> "Tensor":
        return ops.negative(self)

    def __abs__(self) -> "Tensor":
        return ops.absolute(self)

    def __matmul__(self, other: Any) -> "Tensor":
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> "Tensor":
        return matmul(other, self)

    # ---- comparisons (no gradient)

    def __eq__(self, other: Any) -> "Tensor":  # type: ignore[override]
        return tape.wrap(self.data == _raw(other))

    def __ne__(self, other: Any) -> "Tensor":  # type: ignore[override]
        return tape.wrap(self.data != _raw(other))

    def __lt__(self, other: Any) -> "Tensor":
        return tape.wrap(self.data < _raw(other))

    def __le__(self, other: Any) -> "Tensor":
        return tape.wrap(self.data <= _raw(other))

    def __gt__(self, other: Any) -> "Tensor":
        return tape.wrap(self.data > _raw(other))

    def __ge__(self, other: Any) -> "Tensor":
        return tape.wrap(self.data >= _raw(other))

    # ---- elementwise

    def exp(self) -> "Tensor":
        """$e^x$."""
        return ops.exp(self)

    def log(self) -> "Tensor":
        r"""$\ln x$."""
        return ops.log(self)

    def sqrt(self) -> "Tensor":
        r"""$\sqrt x$."""
        return ops.sqrt(self)

    def tanh(self) -> "Tensor":
        r"""$\tanh x$."""
        return ops.tanh(self)

    def sigmoid(self) -> "Tensor":
        r"""$1/(1+e^{-x})$."""
        return ops.sigmoid(self)

    def relu(self) -> "Tensor":
        r"""$\max(x,0)$."""
        return ops.relu(self)

    def abs(self) -> "Tensor":
        """$|x|$."""
        return ops.absolute(self)

    def clamp(self, min: Limit = None, max: Limit = None) -> "Tensor":
        """The values limited to [min, max]."""
        return ops.clip(self, low=min, high=max)

    def masked_fill(self, mask: Any, value: Number) -> "Tensor":
        """The tensor with ``value`` where the mask is true."""
        return ops.where(_raw(mask), value, self)

    # ---- reductions

    def sum(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """The sum over axes (all by default)."""
        return ops.sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """The mean over axes (all by default); NaN for an empty one, as in NumPy."""
        total = ops.sum(self, axis=axis, keepdims=keepdims)
        return total * (total.size / self.size if self.size else np.nan)

    def var(self, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> "Tensor":
        """The variance over axes, divided by ``n - ddof`` (0: population, NumPy's default; torch's is 1)."""
        centred = self - self.mean(axis, keepdims=True)
        total = (centred * centred).sum(axis, keepdims=keepdims)
        n = self.size / max(total.size, 1)
        return total * (1.0 / (n - ddof) if n > ddof else np.nan)

    def std(self, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> "Tensor":
        """The standard deviation, with ``ddof`` as in `var`; gradient 0 where it is 0, as in torch."""
        variance = self.var(axis, keepdims, ddof)
        constant = variance.data == 0
        return ops.where(constant, 0.0, ops.where(constant, 1.0, variance).sqrt())

    def max(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """The largest value over axes; ties share the gradient."""
        return ops.amax(self, axis=axis, keepdims=keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> "Tensor":
        """The smallest value over axes; ties share the gradient."""
        return ops.amin(self, axis=axis, keepdims=keepdims)

    def argmax(self, axis: int | None = None) -> "Tensor":
        """The index of the largest value, the first of several."""
        return tape.wrap(self.data.argmax(axis))

    def cumsum(self, axis: int) -> "Tensor":
        """Running sums along one axis."""
        return ops.cumsum(self, axis=axis)

    # ---- shapes and selection

    def reshape(self, *shape: Any) -> "Tensor":
        """The same elements in another shape; one length may be -1."""
        return ops.reshape(self, shape=_flat(shape))

    view = reshape

    def flatten(self) -> "Tensor":
        """All elements on one axis."""
        return self.reshape(-1)

    def transpose(self, first: int, second: int) -> "Tensor":
        """Two axes exchanged."""
        first, second = _axes("transpose", (first, second), self)
        axes = list(range(self.ndim))
        axes[first], axes[second] = axes[second], axes[first]
        return ops.transpose(self, axes=tuple(axes))

    def permute(self, *axes: Any) -> "Tensor":
        """The axes in another order."""
        return ops.transpose(self, axes=_axes("permute", _flat(axes), self))

    @property
    def T(self) -> "Tensor":
        """The last two axes exchanged (the tensor itself when it has fewer than two)."""
        return self if self.ndim < 2 else self.transpose(-1, -2)

    def unsqueeze(self, axis: int) -> "Tensor":
        """With a new axis of length 1."""
        return self.reshape(np.expand_dims(self.data, axis).shape)

    def squeeze(self, axis: Axis = None) -> "Tensor":
        """Without axes of length 1."""
        return self.reshape(np.squeeze(self.data, axis).shape)

    def expand(self, *shape: Any) -> "Tensor":
        """Axes of length 1 stretched; -1 keeps a length."""
        wanted = _flat(shape)
        require(len(wanted) >= self.ndim, "expand", "the shape", f"of at least {self.ndim} axes", f"{wanted}")
        kept = (1,) * (len(wanted) - self.ndim) + self.shape
        return ops.broadcast_to(self, shape=tuple(k if w == -1 else w for w, k in zip(wanted, kept, strict=True)))

    def flip(self, axis: int) -> "Tensor":
        """One axis backwards."""
        return ops.flip(self, axis=axis)

    def gather(self, axis: int, index: Any) -> "Tensor":
        """Pick along one axis: in 2-d with axis 1, ``out[i, j] = self[i, index[i, j]]``."""
        picks = np.asarray(_raw(index))
        (axis,) = _axes("gather", (axis,), self)
        fits = picks.ndim == self.ndim and all(
            i == axis or n == m for i, (n, m) in enumerate(zip(picks.shape, self.shape, strict=True))
        )
        require(fits, "gather", "the index", f"of shape {self.shape} but for axis {axis}", picks)
        return ops.gather(self, index=picks, axis=axis)

    def __getitem__(self, index: Any) -> "Tensor":
        parts = index if isinstance(index, tuple) else (index,)
        plain = tuple(_raw(part) if isinstance(part, Variable) else part for part in parts)
        return ops.getitem(self, index=plain if isinstance(index, tuple) else plain[0])

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError(
            "Tensor: assignment into a tensor would rewrite history that backward needs. "
            "Use where(), masked_fill() or cat(), or write to .data of a tensor outside any graph."
        )


_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def _raw(value: Any) -> Any:
    return value.data if isinstance(value, Variable) else value


def _flat(shape: tuple) -> tuple[int, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else tuple(shape)


def _axes(where: str, axes: tuple[int, ...], x: Variable) -> tuple[int, ...]:
    """Axes counted from the front, or an error if one does not exist."""
    n = len(x.shape)
    fits = all(-n <= axis < n for axis in axes)
    require(fits, where, "every axis", f"in [{-n}, {n})", f"{axes} for shape {x.shape}", error=IndexError)
    return tuple(axis % n for axis in axes)


def _alike(values: Sequence[Any]) -> list["Tensor"]:
    """All as tensors; constants take the precision of the tensors among them, as in ``tensor + constant``."""
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.dtype.kind == "f"}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return [v if isinstance(v, Tensor) else Tensor(v, dtype=dtype) for v in values]


def as_tensor(value: Any) -> Tensor:
    """The value itself if it is a tensor, otherwise a tensor around it."""
    return value if isinstance(value, Tensor) else Tensor(value)


def matmul(x: Any, y: Any) -> Tensor:
    """Matrix product; vectors are taken as one row (left) or one column (right), as in NumPy.

    Shapes: x (..., m, p), y (..., p, n) -> (..., m, n); 1-d arguments lose their extra axis again.
    Raises: ValueError if the inner lengths differ or an argument is 0-d.
    """
    x, y = _alike((x, y))
    if x.ndim == 0 or y.ndim == 0 or x.shape[-1] != y.shape[max(y.ndim - 2, 0)]:
        raise ValueError(
            message("matmul", "the inner lengths", "equal", f"shapes {x.shape} and {y.shape}")
            + " The last axis of the left must match the second-to-last (or only) axis of the right."
        )
    left = x.reshape(1, -1) if x.ndim == 1 else x
    right = y.reshape(-1, 1) if y.ndim == 1 else y
    out = ops.matmul(left, right)
    if x.ndim == 1:
        out = out.reshape(out.shape[:-2] + out.shape[-1:])
    return out.reshape(out.shape[:-1]) if y.ndim == 1 else out


def where(condition: Any, x: Any, y: Any) -> Tensor:
    """x where the condition is true, y elsewhere; gradients go only to the side taken."""
    return ops.where(_raw(condition), x, y)


def cat(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """Tensors joined along an existing axis."""
    if not tensors:
        raise ValueError("cat: at least one tensor is wanted, got an empty sequence.")
    parts = _alike(tensors)
    hint = "Use stack() for 0-d tensors."
    require(parts[0].ndim > 0, "cat", "the tensors", "of at least 1 axis", parts[0], hint)
    return ops.concatenate(*parts, axis=_axes("cat", (axis,), parts[0])[0])


def stack(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """Tensors of one shape joined along a new axis."""
    return cat([t.unsqueeze(axis) for t in _alike(tensors)], axis=axis)


def zeros(*shape: Any, dtype: Any = np.float32, requires_grad: bool = False) -> Tensor:
    """A tensor of zeros."""
    return Tensor(np.zeros(_flat(shape), dtype), requires_grad)


def ones(*shape: Any, dtype: Any = np.float32, requires_grad: bool = False) -> Tensor:
    """A tensor of ones."""
    return Tensor(np.ones(_flat(shape), dtype), requires_grad)


def arange(*bounds: int, dtype: Any = None) -> Tensor:
    """Consecutive numbers, as NumPy's arange."""
    return tape.wrap(np.arange(*bounds, dtype=dtype))
