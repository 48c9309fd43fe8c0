"""The fused GELU and its approximation: PyTorch agrees, in value and gradient, also far out and for no elements."""

from typing import Any

import numpy as np
import pytest
import torch

from minillm.autograd import Tensor, grad
from minillm.fused.activations import CHUNK, gelu, gelu_tanh

FORMS = [
    pytest.param(gelu, "none", marks=pytest.mark.equation("gelu")),
    pytest.param(gelu_tanh, "tanh", marks=pytest.mark.equation("gelu-tanh")),
]


@pytest.mark.parametrize(("ours", "approximate"), FORMS)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 1), (2, CHUNK // 2 + 5)])
def test_torch_agrees(ours, approximate, shape):
    rng = np.random.default_rng(0)
    data, upstream = (np.asarray(3 * rng.normal(size=shape), np.float32) for _ in range(2))
    x, theirs = Tensor(data, requires_grad=True), torch.tensor(data, dtype=torch.float64, requires_grad=True)
    y, wanted = ours(x), torch.nn.functional.gelu(theirs, approximate=approximate)
    exact: Any = torch.autograd.grad(wanted, theirs, torch.tensor(upstream, dtype=torch.float64))[0]
    dx = grad([y], [x], [upstream])[0]
    assert y.shape == dx.shape == shape and y.dtype == dx.dtype == np.float32
    z, eps = np.abs(data.astype(np.float64)), np.finfo(np.float32).eps
    # Far out 1 - t^2 (or the density) is rounding of size eps, times the derivative of the inner polynomial.
    amplified = 1 + z * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
    assert (np.abs(y.data - wanted.detach().numpy()) <= 8 * eps * (1 + z)).all()
    assert (np.abs(dx.data - exact.numpy()) <= 8 * eps * np.abs(upstream) * amplified).all()


@pytest.mark.parametrize(("ours", "approximate"), FORMS)
def test_far_out_it_is_the_input_or_nothing(ours, approximate):
    data = np.array([-1e12, -50, 50, 1e12], np.float32)
    x = Tensor(data, requires_grad=True)
    y = ours(x)
    np.testing.assert_array_equal(y.data, np.maximum(data, 0))
    np.testing.assert_array_equal(grad([y], [x], [np.ones(4, np.float32)])[0].data, [0, 0, 1, 1])
