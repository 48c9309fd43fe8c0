"""Activations and gated units: values, slopes and limits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.autograd import primitives as ops
from minillm.functional import activations as written
from minillm.fused import activations as derived

seeds = st.integers(0, 2**32 - 1)
BOTH = pytest.mark.parametrize("form", [written, derived], ids=["written", "derived"])
GRID = np.linspace(-8, 8, 4001)


@pytest.mark.equation("sigmoid", "silu", "gelu", "relu")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ops.sigmoid, torch.sigmoid),
        (written.silu, torch.nn.functional.silu),
        (written.gelu, torch.nn.functional.gelu),
        (written.gelu_tanh, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        (ops.relu, torch.relu),
    ],
    ids=["sigmoid", "silu", "gelu", "gelu_tanh", "relu"],
)
def test_torch_agrees(ours, theirs):
    x, t = Tensor(GRID, requires_grad=True), torch.tensor(GRID, requires_grad=True)
    y, u = ours(x), theirs(t)
    np.testing.assert_allclose(y.data, u.detach().numpy(), rtol=1e-10, atol=1e-13)
    (slope,) = torch.autograd.grad(u.sum(), t)
    np.testing.assert_allclose(grad(y.sum(), x).data, slope.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.equation("gelu-tanh", "wn-gelu-tanh")
def test_the_tanh_form_stays_within_five_ten_thousandths():
    gap = np.abs(written.gelu(Tensor(GRID)).data - written.gelu_tanh(Tensor(GRID)).data).max()
    assert gap == pytest.approx(4.7e-4, abs=0.1e-4)


@pytest.mark.equation("gelu")
def test_gelu_is_input_times_the_distribution_function():
    """Erratum 15: GELU(x) / x is the Gaussian distribution function; it is not an approximation of it."""
    x = np.array([-2.0, -1.0, 0.5, 1.0, 3.0])
    phi = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(x)).numpy()
    np.testing.assert_allclose(written.gelu(Tensor(x)).data / x, phi, rtol=1e-6)


@BOTH
@pytest.mark.equation("swiglu", "geglu", "glu-split")
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@given(seed=seeds)
def test_a_gated_unit_is_linear_in_its_value_and_closed_by_a_zero_gate(form, name, seed):
    rng = np.random.default_rng(seed)
    unit = getattr(form, name)
    value, more, gate = (rng.normal(size=(3, 4)) for _ in range(3))

    def apply(v, g):
        return unit(Tensor(np.concatenate([v, g], axis=-1))).data

    np.testing.assert_allclose(apply(2 * value + more, gate), 2 * apply(value, gate) + apply(more, gate), atol=1e-12)
    assert not apply(value, np.zeros_like(gate)).any()
    act = written.silu if name == "swiglu" else written.gelu
    np.testing.assert_allclose(apply(value, gate), value * act(Tensor(gate)).data, rtol=1e-12, atol=1e-14)


@BOTH
@pytest.mark.equation("swiglu")
def test_extreme_gates_are_finite(form):
    h = np.array([[1.0, 1.0, -1e4, 1e4]], dtype=np.float32)
    x = Tensor(h, requires_grad=True)
    y = form.swiglu(x)
    np.testing.assert_array_equal(y.data, [[0, 1e4]])
    np.testing.assert_allclose(grad(y.sum(), x).data, [[0, 1e4, 0, 1]])


@pytest.mark.equation("swiglu")
def test_chunks_do_not_show(monkeypatch):
    h = np.random.default_rng(0).normal(size=(50, 14))
    x = Tensor(h, requires_grad=True)
    whole = derived.swiglu(x)
    d_whole = grad(whole.sum(), x).data
    monkeypatch.setattr(derived, "CHUNK", 30)
    parts = derived.swiglu(x)
    np.testing.assert_array_equal(whole.data, parts.data)
    np.testing.assert_array_equal(d_whole, grad(parts.sum(), x).data)


@BOTH
def test_an_odd_width_is_refused(form):
    with pytest.raises(ValueError, match="of even length 2 d_ff"):
        form.swiglu(Tensor(np.ones((2, 5))))
