"""Gradients of gradients: through primitives, through derived forms, and what they are needed for later."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from minillm.autograd import Tensor, grad, gradcheck, no_grad
from minillm.functional import positions
from minillm.functional.information import kl_token_exact
from minillm.fused.activations import swiglu
from minillm.fused.attention import rotary_attention
from minillm.fused.linear import embedding, linear
from minillm.fused.losses import cross_entropy
from minillm.fused.norms import add_rms_norm, rms_norm
from minillm.fused.softmax import log_softmax, softmax
from tests import strategies

pytestmark = pytest.mark.equation("autograd-engine")


def leaf(values) -> Tensor:
    return Tensor(np.asarray(values, dtype=np.float64), requires_grad=True)


def test_derivatives_of_every_order_of_a_power():
    x = leaf(1.5)
    y, wanted = x**5, 1.5**5
    for order in range(1, 7):
        y = grad(y, x, create_graph=True)
        wanted = float(np.prod(np.arange(5, 5 - order, -1))) * 1.5 ** max(5 - order, 0)
        assert y.item() == pytest.approx(wanted)


def test_the_second_derivative_in_the_exponent_at_zero():
    """d2/dxdy of x^y at y = 0 is 1/x, and not what a guard against 0 * inf makes of it."""
    x, y = leaf([2.0, 3.0]), leaf([0.0, 1.0])
    slope = grad((x**y).sum(), x, create_graph=True)
    np.testing.assert_allclose(grad(slope.sum(), y).data, [0.5, 1 + np.log(3.0)])


def test_backward_with_create_graph_leaves_a_gradient_that_can_be_differentiated():
    """A penalty on the gradient: d/dx |grad f|^2."""
    x = leaf([1.0, 2.0])
    (x * x * x).sum().backward(create_graph=True)
    penalty = (x.grad * x.grad).sum()
    assert grad(penalty, x).tolist() == [36.0, 288.0]  # (9 x^4)' = 36 x^3


def test_a_jacobian_vector_product_by_differentiating_twice():
    """The VJP is linear in its cotangent; its transpose is the forward derivative."""
    rng = np.random.default_rng(0)
    x, v = leaf(rng.normal(size=5)), rng.normal(size=5)
    cotangent = leaf(np.zeros(5))
    pulled = grad(softmax(x), x, cotangent, create_graph=True)
    pushed = grad(pulled, cotangent, v)
    p = np.exp(x.data) / np.exp(x.data).sum()
    np.testing.assert_allclose(pushed.data, p * v - p * (p @ v), atol=1e-14)


def test_first_derivatives_are_the_same_with_and_without_a_graph_of_their_own():
    x = leaf(np.random.default_rng(0).normal(size=(2, 4)))
    loss = (log_softmax(x) * x).sum()
    plain = grad(loss, x, retain_graph=True)
    np.testing.assert_allclose(grad(loss, x, create_graph=True).data, plain.data, atol=1e-14)
    assert plain.node is None and not plain.requires_grad


# ---------------------------------------------------------------------------- a whole block


class Block:
    """A decoder block of derived forms, from token ids to the loss; residual, so inputs depend on one another."""

    def __init__(self, rng: np.random.Generator):
        V, d, H, L = 5, 4, 2, 3
        self.ids, self.targets = rng.integers(V, size=(2, L)), rng.integers(V, size=(2, L))
        self.angles = positions.rotation_angles(np.arange(L), d // H, 100.0)
        self.H = H
        self.weights = [
            rng.normal(size=shape) * 0.5
            for shape in [(V, d), (d,), (3 * d, d), (d, d), (d,), (2 * 3, d), (d, 3), (V, d)]
        ]

    def loss(self, *weights: Tensor) -> Tensor:
        table, g1, w_qkv, w_o, g2, w_in, w_out, head = weights
        x = embedding(self.ids, table)
        attended = rotary_attention(linear(rms_norm(x, g1), w_qkv), angles=self.angles, H=self.H, H_kv=self.H)
        x, y = add_rms_norm(x, linear(attended, w_o), g2)
        x = x + linear(swiglu(linear(y, w_in)), w_out)
        return cross_entropy(linear(x, head), self.targets)

    def gradient(self, weights: list[np.ndarray], create_graph: bool = False):
        leaves = [leaf(w) for w in weights]
        return leaves, grad(self.loss(*leaves), leaves, create_graph=create_graph)


def test_a_hessian_vector_product_through_a_transformer_block():
    """The gradient of <grad, v> against central differences of the gradient along v."""
    rng = np.random.default_rng(3)
    block = Block(rng)
    direction = [rng.normal(size=w.shape) for w in block.weights]
    leaves, gradient = block.gradient(block.weights, create_graph=True)
    product = grad(sum((g * v).sum() for g, v in zip(gradient, direction)), leaves)
    h = 1e-5
    ahead = block.gradient([w + h * v for w, v in zip(block.weights, direction)])[1]
    behind = block.gradient([w - h * v for w, v in zip(block.weights, direction)])[1]
    for found, a, b in zip(product, ahead, behind):
        numeric = (a.data - b.data) / (2 * h)
        np.testing.assert_allclose(found.data, numeric, atol=1e-8 * max(1, np.abs(numeric).max()))


def test_the_gradient_of_a_block_is_the_same_through_written_and_derived_forms():
    """With ``create_graph`` every derived form is replaced by its as-written twin."""
    block = Block(np.random.default_rng(5))
    for a, b in zip(block.gradient(block.weights)[1], block.gradient(block.weights, create_graph=True)[1]):
        np.testing.assert_allclose(a.data, b.data, atol=1e-13)


def test_the_hessian_of_a_loss_is_that_of_torch():
    rng = np.random.default_rng(1)
    x, targets, w = rng.normal(size=(6, 3)), rng.integers(4, size=6), rng.normal(size=(4, 3))

    def torch_loss(weight):
        return torch.nn.functional.cross_entropy(torch.tensor(x) @ weight.T, torch.tensor(targets))

    wanted = torch.autograd.functional.hessian(torch_loss, torch.tensor(w)).numpy().reshape(12, 12)
    weight = leaf(w)
    gradient = grad(cross_entropy(linear(Tensor(x), weight), targets), weight, create_graph=True).reshape(-1)
    rows = [grad(gradient[i], weight, retain_graph=True).data.reshape(-1) for i in range(12)]
    np.testing.assert_allclose(np.stack(rows), wanted, atol=1e-13)


def test_a_fisher_vector_product_is_the_hessian_of_the_divergence():
    """What TRPO needs: F v = grad <grad KL(old, theta), v> at theta = old, against the sum over outcomes."""
    rng = np.random.default_rng(2)
    x, w, v = rng.normal(size=(3, 2)), rng.normal(size=(4, 2)), rng.normal(size=(4, 2))
    weight = leaf(w)
    with no_grad():
        old = linear(Tensor(x), Tensor(w))
    kl = kl_token_exact(old, linear(Tensor(x), weight)).sum()
    slope = grad(kl, weight, create_graph=True)
    np.testing.assert_allclose(slope.data, 0, atol=1e-14)
    product = grad((slope * v).sum(), weight)

    logits = x @ w.T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    fisher = np.zeros((8, 8))
    for n in range(3):
        for a in range(4):
            score = np.outer(np.eye(4)[a] - p[n], x[n]).reshape(-1)
            fisher += p[n, a] * np.outer(score, score)
    np.testing.assert_allclose(product.data.reshape(-1), fisher @ v.reshape(-1), atol=1e-13)


@settings(max_examples=10)
@given(seed=strategies.seeds())
def test_the_hessian_vector_product_is_linear_and_symmetric(seed):
    rng = np.random.default_rng(seed)
    x, u, v = rng.normal(size=(3, 2, 4))

    def hessian_times(direction):
        at = leaf(x)
        slope = grad(cross_entropy(at * at, np.array([1, 2])), at, create_graph=True)
        return grad((slope * direction).sum(), at).data

    np.testing.assert_allclose((hessian_times(u) * v).sum(), (hessian_times(v) * u).sum(), atol=1e-12)
    np.testing.assert_allclose(hessian_times(u + 2 * v), hessian_times(u) + 2 * hessian_times(v), atol=1e-12)


def test_second_derivatives_of_piecewise_functions_are_zero_away_from_the_kinks():
    def slopes(x):
        at = Tensor(x.data, requires_grad=True) if not x.requires_grad else x
        return grad((at.relu() * at.abs()).sum(), at, create_graph=True)

    x = leaf([-2.0, 3.0])
    np.testing.assert_allclose(slopes(x).data, [0.0, 6.0])
    np.testing.assert_allclose(grad(slopes(x).sum(), x).data, [0.0, 2.0])


def test_create_graph_in_a_gradient_check_of_a_gradient():
    def squared_slope(x):
        at = x if x.requires_grad else Tensor(x.data, requires_grad=True)
        from minillm.autograd.tape import recording

        with recording(True):
            slope = grad(softmax(at)[0], at, create_graph=True)
            return (slope * slope).sum()

    assert gradcheck(squared_slope, [np.array([0.3, -0.2, 0.9])]).passed
