"""Which precision comes out: float32 unless float64 goes in as a tensor, and no silent mixture."""

import numpy as np
import pytest

from minillm.autograd import Tensor, arange, cat, grad, matmul, ones, stack, where
from minillm.autograd import primitives as ops
from minillm.fused.norms import rms_norm

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (1.0, F32),
        ([1.0, 2.0], F32),
        ([[np.float64(1.0)]], F32),
        (np.ones(2), F64),
        (np.float64(1.0), F64),
        (np.ones(2, np.float32), F32),
        (3, np.int64),
        ([1, 2], np.int64),
        (np.ones(2, np.int32), np.int32),
        (True, np.bool_),
        (np.uint8(3), np.uint8),
        (Tensor([1.0]), F32),
    ],
)
def test_python_data_becomes_float32_and_numpy_data_stays(data, wanted):
    assert Tensor(data).dtype == wanted
    assert Tensor(data, dtype=np.float64).dtype == F64


CONSTANTS = {
    "a Python float": 2.0,
    "a Python integer": 2,
    "a boolean": True,
    "a float64 scalar": np.float64(2.0),
    "a float32 scalar": np.float32(2.0),
    "an integer scalar": np.int64(2),
    "a float64 array": np.array([2.0, 3.0]),
    "a float32 array": np.array([2.0, 3.0], np.float32),
    "an integer array": np.array([2, 3]),
    "a boolean array": np.array([True, True]),
    "a list": [2.0, 3.0],
    "an integer tensor": Tensor([2, 3]),
    "a boolean tensor": Tensor([True, True]),
}
OPERATIONS = {
    "+": lambda x, c: x + c,
    "-": lambda x, c: x - c,
    "*": lambda x, c: x * c,
    "/": lambda x, c: x / c,
    "**": lambda x, c: x**c,
    "c+": lambda x, c: c + x if not isinstance(c, list) else ops.add(c, x),
    "c-": lambda x, c: c - x if not isinstance(c, list) else ops.subtract(c, x),
    "c**": lambda x, c: c**x if not isinstance(c, list) else ops.power(c, x),
    "maximum": lambda x, c: ops.maximum(x, c),
    "logaddexp": lambda x, c: ops.logaddexp(c, x),
    "where": lambda x, c: where(np.array([True, False]), x, c),
}


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_constant_adopts_the_precision_of_the_tensor(operation, constant, dtype):
    x = Tensor(np.array([1.5, 2.5], dtype), requires_grad=True)
    y = OPERATIONS[operation](x, CONSTANTS[constant])
    assert y.dtype == dtype
    assert grad(y.sum(), x).dtype == dtype


@pytest.mark.parametrize("dtype", [F32, F64])
def test_matmul_cat_and_stack_let_constants_adopt_it_too(dtype):
    x = Tensor(np.ones((2, 2), dtype), requires_grad=True)
    for y in (x @ np.eye(2), np.eye(2) @ x, x @ [[1.0], [2.0]], x @ np.array([[1, 0], [0, 1]])):
        assert y.dtype == dtype and grad(y.sum(), x).dtype == dtype
    for y in (cat([x, np.ones((1, 2))]), cat([[[1.0, 2.0]], x]), cat([x, np.array([[1, 2]])]), stack([x, np.eye(2)])):
        assert y.dtype == dtype and grad(y.sum(), x).dtype == dtype


BINARY = [ops.add, ops.subtract, ops.multiply, ops.divide, ops.power, ops.maximum, ops.minimum, ops.logaddexp]


@pytest.mark.parametrize(
    "mix",
    [*BINARY, matmul, lambda x, y: cat([x, y]), lambda x, y: where(np.ones((2, 2), bool), x, y), rms_norm],
    ids=[*(p.name for p in BINARY), "matmul", "cat", "where", "derived"],
)
def test_two_tensors_of_different_precision_do_not_mix(mix):
    x, y = ones(2, 2), ones(2, 2, dtype=np.float64)
    with pytest.raises(TypeError, match=r"tensors of one precision are wanted, got float32 and float64.*\.double\(\)"):
        mix(x, y[0] if mix is rms_norm else y)
    assert mix(x.double(), y[0] if mix is rms_norm else y).dtype == F64


def test_conversion_passes_the_gradient_back_in_the_precision_it_came_from():
    x = Tensor(np.array([1.0, 2.0], np.float32), requires_grad=True)
    (x.double() * np.array([3.0, 4.0])).sum().backward()
    assert x.grad.dtype == F32 and x.grad.tolist() == [3.0, 4.0]


def test_integers_and_booleans_never_make_float64():
    i, b = arange(1, 4), Tensor([True, False, True])
    for y in (i * 0.5, i / 2, i.mean(), i.exp(), i.var(), b.mean(), b.exp(), i.sigmoid(), i**0.5, 1.0 / i, i + 1.5):
        assert y.dtype == F32
    for y in (where(b, 1.0, 0.0), ops.exp(2.0), ops.add(1.0, 2.0), ops.maximum(i, 0.5)):
        assert y.dtype == F32
    assert i.mean().item() == 2.0 and (i / 2).tolist() == [0.5, 1.0, 1.5]


def test_integers_stay_integers_where_they_can():
    i = arange(4)
    for y in (i + 1, i * i, i.sum(), i.reshape(2, 2), i[1:], -i, i.max(), i.clone(), i.cumsum(0), cat([i, i])):
        assert y.dtype == np.int64 and not y.requires_grad
    assert Tensor([True, False, True]).sum().item() == 2


def test_integer_tensors_index_mask_and_pick():
    x = Tensor(np.arange(12.0).reshape(3, 4), requires_grad=True)
    assert x[Tensor([0, 2])].shape == (2, 4)
    assert x[Tensor([True, False, True])].shape == (2, 4)
    assert x[Tensor(1), Tensor([0, 3])].tolist() == [4.0, 7.0]
    assert x.gather(1, Tensor([[1], [2], [3]])).tolist() == [[1.0], [6.0], [11.0]]
    assert x.masked_fill(Tensor([True, False, False, False]), 0.0).data[:, 0].tolist() == [0.0, 0.0, 0.0]


def test_a_long_float32_computation_stays_float32():
    x = Tensor([0.5, 1.5], requires_grad=True)
    y = (x.exp() + 1).log() * np.pi / np.float64(3) - np.array([1.0, 2.0])
    y = (y - y.mean(keepdims=True)) / (y.var() + 1e-5).sqrt() + y.max() * y.std(ddof=1) + y.clamp(0.0, 1.0)
    y = where(y > 0, y, 0.0) @ np.eye(2) + 2**y
    y.sum().backward()
    assert y.dtype == F32 and x.grad.dtype == F32
    assert all(isinstance(t.dtype, np.dtype) for t in (x, y))
