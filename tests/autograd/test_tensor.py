"""The tensor beside torch: the same names give the same numbers; what is refused is refused in words."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor, arange, as_tensor, cat, matmul, ones, stack, where, zeros
from tests import forms, strategies
from tests.oracles import torch_oracle

INDEX = np.array([[0, 2], [1, 1]])

# Name: ours, torch's, a strategy for the arguments. Where the two signatures are equal one function does for both.
SAME = {
    "exp": lambda x: x.exp(),
    "log": lambda x: (x * x + 1.0).log(),
    "sqrt": lambda x: (x * x + 1.0).sqrt(),
    "tanh": lambda x: x.tanh(),
    "sigmoid": lambda x: x.sigmoid(),
    "relu": lambda x: x.relu(),
    "abs": lambda x: x.abs(),
    "clamp": lambda x: x.clamp(-1.0, 1.5),
    "clamp_min": lambda x: x.clamp(min=-0.5),
    "clamp_max": lambda x: x.clamp(max=0.5),
    "neg": lambda x: -x,
    "pow": lambda x: (x * x + 0.5) ** 1.5,
    "square": lambda x: x**2,
    "rpow": lambda x: 2.0**x,
    "radd": lambda x: 1.5 + x,
    "rsub": lambda x: 1.5 - x,
    "rmul": lambda x: 1.5 * x,
    "rtruediv": lambda x: 1.5 / (x * x + 1.0),
    "sum": lambda x: x.sum(),
    "sum_axis": lambda x: x.sum(1),
    "sum_axes": lambda x: x.sum((0, 2)),
    "mean": lambda x: x.mean(),
    "mean_axis": lambda x: x.mean(-1),
    "clone": lambda x: x.clone(),
    "reshape": lambda x: x.reshape(2, -1),
    "reshape_tuple": lambda x: x.reshape((4, 3)),
    "view": lambda x: x.view(-1),
    "flatten": lambda x: x.flatten(),
    "transpose": lambda x: x.transpose(0, 2),
    "transpose_negative": lambda x: x.transpose(-1, -2),
    "permute": lambda x: x.permute(2, 0, 1),
    "permute_tuple": lambda x: x.permute((1, 2, 0)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "unsqueeze_last": lambda x: x.unsqueeze(-1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1),
    "expand_new_axis": lambda x: x.expand(4, *x.shape),
    "getitem": lambda x: x[0, :, 1:],
    "getitem_none": lambda x: x[:, None, ..., 0],
    "getitem_list": lambda x: x[:, [0, 2, 2]],
    "cumsum": lambda x: x.cumsum(1),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "detach": lambda x: x * x.detach(),
    "iteration": lambda x: sum(row.sum() * i for i, row in enumerate(x)),
}
DIFFERENT = {
    "max": (lambda x: x.max(1), lambda x: x.amax(1)),
    "min": (lambda x: x.min((0, 1)), lambda x: x.amin((0, 1))),
    "max_all": (lambda x: x.max(), lambda x: x.amax()),
    "keepdims": (lambda x: x.sum(1, keepdims=True), lambda x: x.sum(1, keepdim=True)),
    "var": (lambda x: x.var(1), lambda x: x.var(1, correction=0)),
    "var_unbiased": (lambda x: x.var(-1, ddof=1), lambda x: x.var(-1)),
    "std": (lambda x: x.std(1, ddof=1), lambda x: x.std(1)),
    "T": (lambda x: x.T, lambda x: x.mT),
    "flip": (lambda x: x.flip(1), lambda x: x.flip((1,))),
    "gather": (lambda x: x[0].gather(1, INDEX), lambda x: x[0].gather(1, torch.tensor(INDEX))),
    "masked_fill": (
        lambda x: x.masked_fill(np.eye(3, dtype=bool), 7.0),
        lambda x: x.masked_fill(torch.eye(3).bool(), 7.0),
    ),
    "where": (lambda x: where(x > 0, x, 0.5), lambda x: torch.where(x > 0, x, 0.5)),
    "cat": (lambda x: cat([x, x * 2.0], axis=-1), lambda x: torch.cat([x, x * 2.0], dim=-1)),
    "stack": (lambda x: stack([x, x * x], axis=1), lambda x: torch.stack([x, x * x], dim=1)),
    "stack_last": (lambda x: stack([x, x * x], axis=-1), lambda x: torch.stack([x, x * x], dim=-1)),
    "matmul_vector": (lambda x: matmul(x, x[0, 0]), lambda x: x @ x[0, 0]),
    "vector_matmul": (lambda x: matmul(x[0, :, 0][:2], x[0, :2]), lambda x: x[0, :, 0][:2] @ x[0, :2]),
    "dot": (lambda x: x[0, 0] @ x[1, 1], lambda x: x[0, 0] @ x[1, 1]),
    "double": (lambda x: x.float().double(), lambda x: x.float().double()),
}
CASES = {name: (same, same) for name, same in SAME.items()} | DIFFERENT


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8)
@given(data=st.data())
def test_a_name_means_what_it_means_in_torch(name, data):
    shape = (2, 3, 3) if name in ("masked_fill", "vector_matmul") else (2, 3, 2)
    shape = (2, 2, 3) if name == "gather" else shape
    x = data.draw(strategies.ordinary(shape) if "max" in name or "std" in name else strategies.contents(shape))
    ours = forms.evaluate(CASES[name][0], (x,), {})
    theirs = torch_oracle.evaluate(CASES[name][1], (x,), {}, forms.cotangents_for(ours.values))
    for a, b in zip(ours.arrays, theirs.arrays, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_argmax_comparisons_and_conversions():
    x = Tensor([[1.0, 3.0, 3.0], [0.0, -1.0, 2.0]])
    assert x.argmax(-1).tolist() == [1, 2] and x.argmax().item() == 1
    other = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
        ours, theirs = getattr(x, name)(other), getattr(torch.tensor(x.data), name)(torch.tensor(other))
        assert ours.dtype == bool and not ours.requires_grad
        np.testing.assert_array_equal(ours.data, theirs.numpy())
    assert float(Tensor(2.5)) == 2.5 and int(Tensor([3])[0]) == 3 and bool(Tensor(1.0))
    assert Tensor([[7.0]]).item() == 7.0 and x.tolist()[1] == [0.0, -1.0, 2.0]
    assert x.ndim == 2 and x.size == 6 and x.shape == (2, 3) and len(x) == 2
    assert hash(x) == hash(x) and x.numpy() is x.data


def test_makers():
    assert zeros(2, 3).shape == (2, 3) and zeros((2, 3)).dtype == np.float32
    assert ones(2, dtype=np.float64).tolist() == [1.0, 1.0] and ones(2, requires_grad=True).requires_grad
    assert arange(2, 5).tolist() == [2, 3, 4] and arange(3).dtype == np.int64
    x = Tensor([1.0])
    assert as_tensor(x) is x and as_tensor([1.0]).dtype == np.float32
    assert Tensor(x).data is x.data and Tensor([x, x]).shape == (2, 1)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (Tensor([1.0, 2.0]), "Tensor(shape=(2,), dtype=float32, [1. 2.])"),
        (Tensor(1.5, requires_grad=True), "Tensor(shape=(), dtype=float32, requires_grad=True, 1.5)"),
        (Tensor([1.0], requires_grad=True) * 2.0, "Tensor(shape=(1,), dtype=float32, from=multiply, [2.])"),
        (Tensor([True]), "Tensor(shape=(1,), dtype=bool, [ True])"),
        (zeros(0, 3), "Tensor(shape=(0, 3), dtype=float32, [])"),
        (zeros(2, 1), "Tensor(shape=(2, 1), dtype=float32,\n[[0.]\n [0.]])"),
    ],
)
def test_repr_shows_shape_and_dtype_and_where_it_came_from(tensor, text):
    assert repr(tensor) == text


def test_repr_of_a_large_tensor_is_short():
    assert len(repr(zeros(1000, 1000))) < 400


REFUSED = {
    "half precision": (lambda: Tensor(np.ones(2, np.float16)), TypeError, "float32, float64, integers or booleans"),
    "complex numbers": (lambda: Tensor(np.ones(2, complex)), TypeError, "got complex128"),
    "strings": (lambda: Tensor(["a"]), TypeError, "Tensor: the elements must be"),
    "gradients of integers": (
        lambda: Tensor([1, 2], requires_grad=True),
        TypeError,
        "floating point when requires_grad",
    ),
    "assignment": (lambda: ones(2).__setitem__(0, 1.0), TypeError, "rewrite history"),
    "item of several": (lambda: ones(2).item(), ValueError, "of one element, got shape (2,)"),
    "length of 0-d": (lambda: len(Tensor(1.0)), TypeError, "at least 1 axis"),
    "iteration of 0-d": (lambda: list(Tensor(1.0)), TypeError, "at least 1 axis"),
    "shapes in add": (lambda: ones(2) + ones(3), ValueError, "add: cannot work on shapes (2,), (3,)"),
    "shapes in where": (lambda: where(np.ones(3, bool), ones(2), 0.0), ValueError, "where: cannot work on shapes (3,)"),
    "inner lengths": (lambda: ones(2, 3) @ ones(2, 3), ValueError, "inner lengths must be equal, got shapes (2, 3)"),
    "matmul of 0-d": (lambda: Tensor(1.0) @ ones(2), ValueError, "got shapes () and (2,)"),
    "matmul batches": (lambda: ones(2, 3, 4) @ ones(3, 4, 2), ValueError, "matmul: cannot work on shapes (2, 3, 4)"),
    "reshape": (lambda: ones(2, 3).reshape(4), ValueError, "reshape: cannot work on shapes (2, 3)"),
    "axis of sum": (lambda: ones(2).sum(3), ValueError, "sum: cannot work on shapes (2,): axis 3 is out of bounds"),
    "max of nothing": (lambda: zeros(0).max(), ValueError, "amax: cannot work on shapes (0,)"),
    "index": (lambda: ones(2)[5], IndexError, "getitem: cannot work on shapes (2,): index 5 is out of bounds"),
    "axes of permute": (lambda: ones(2, 3).permute(0, 3), IndexError, "permute: every axis must be in [-2, 2)"),
    "axes of transpose": (lambda: ones(2).transpose(0, 1), IndexError, "transpose: every axis must be in [-1, 1)"),
    "axis of cat": (lambda: cat([ones(2), ones(2)], axis=1), IndexError, "cat: every axis must be in [-1, 1)"),
    "cat of 0-d": (lambda: cat([Tensor(1.0)]), ValueError, "Use stack() for 0-d tensors"),
    "cat of nothing": (lambda: cat([]), ValueError, "at least one tensor"),
    "cat of other shapes": (lambda: cat([ones(2, 2), ones(2, 3)]), ValueError, "concatenate: cannot work on shapes"),
    "expand to fewer axes": (lambda: ones(2, 3).expand(3), ValueError, "expand: the shape must be of at least 2 axes"),
    "gather of another shape": (lambda: ones(3, 4).gather(1, [[0]]), ValueError, "gather: the index must be of shape"),
    "None": (lambda: ones(2) + None, TypeError, "add: an argument must be a tensor, an array or a number, got None"),
    "text": (lambda: ones(2) * "a", TypeError, "multiply: an argument must be"),
    "NumPy functions on gradients": (lambda: np.mean(ones(2, requires_grad=True).exp().T[None]), TypeError, ""),
    "arrays of what requires a gradient": (lambda: np.asarray(ones(2, requires_grad=True)), TypeError, ".detach()"),
    "NumPy ufuncs": (lambda: np.exp(ones(2)), TypeError, "__array_ufunc__"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_with_what_was_received_and_wanted(what):
    action, error, text = REFUSED[what]
    with pytest.raises(error) as caught:
        action()
    assert text in str(caught.value)


def test_a_tensor_without_gradient_is_an_array_to_numpy():
    x = Tensor([[1.0, 2.0]])
    assert np.asarray(x).dtype == np.float32 and np.concatenate([x, x]).shape == (2, 2)
    assert np.shares_memory(np.asarray(x), x.data) and not np.shares_memory(np.array(x), x.data)


def test_array_operators_come_to_the_tensor():
    x = Tensor([1.0, 2.0], requires_grad=True)
    for y in (np.ones(2) + x, np.ones(2) - x, np.ones(2) * x, np.ones(2) / x, np.ones((3, 2)) @ x, np.float64(2) ** x):
        assert isinstance(y, Tensor) and y.requires_grad and y.dtype == np.float32


def test_a_subclass_does_not_change_what_operations_return():
    class Parameter(Tensor):
        __slots__ = ()

    p = Parameter([1.0], requires_grad=True)
    assert type(ones(2) + 1.0) is Tensor and type(p * 2.0) is Tensor and isinstance(p, Tensor)


@settings(max_examples=30)
@given(data=st.data(), layout=strategies.layouts(), shape=strategies.shapes(min_dims=1))
def test_views_with_gaps_and_negative_steps_are_taken_as_they_are(data, layout, shape):
    """A tensor around a view shares its memory, and gradients do not depend on the strides."""
    x = data.draw(strategies.ordinary(shape))
    view = strategies.laid_out(x, layout)
    assert np.shares_memory(Tensor(view).data, view) or not x.size
    found = forms.evaluate(lambda t: (t.exp() * t).sum(-1), (view,), {})
    plain = forms.evaluate(lambda t: (t.exp() * t).sum(-1), (x,), {})
    for a, b in zip(found.arrays, plain.arrays, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("reduction", ["sum", "mean", "var", "std"])
@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_reductions_of_empty_arrays_are_those_of_numpy(reduction, axis, shape):
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's own, about the mean of nothing
        wanted = getattr(np.zeros(shape), reduction)(axis=axis)
    found = getattr(Tensor(np.zeros(shape)), reduction)(axis)
    np.testing.assert_array_equal(found.data, wanted)


def test_std_of_a_constant_has_gradient_zero_as_in_torch():
    x = np.ones((2, 3))
    ours = forms.evaluate(lambda t: t.std(1, ddof=1), (x,), {})
    theirs = torch_oracle.evaluate(lambda t: t.std(1), (x,), {}, forms.cotangents_for(ours.values))
    np.testing.assert_array_equal(ours.gradients[0], theirs.gradients[0])
    assert not np.any(ours.gradients[0])
