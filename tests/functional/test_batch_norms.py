"""Norms over batches and groups: torch's own, running statistics, what a norm costs, bad input."""

import time

import numpy as np
import pytest
import torch

from minillm.autograd import Tensor, grad
from minillm.functional import batch_norms as bn
from minillm.functional.norms import layer_norm, rms_norm


def draw(rng, *shape):
    return rng.normal(size=shape), rng.normal(size=shape[1]), rng.normal(size=shape[1])


@pytest.mark.equation("batchnorm-1d", "batchnorm-2d", "groupnorm")
@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (bn.batch_norm_1d, lambda x, g, b: torch.nn.functional.batch_norm(x, None, None, g, b, training=True), (6, 4)),
        (bn.batch_norm_2d, lambda x, g, b: torch.nn.functional.batch_norm(x, None, None, g, b, training=True), (3, 4, 5, 2)),
        (lambda *a: bn.group_norm(*a, n_groups=2), lambda x, g, b: torch.nn.functional.group_norm(x, 2, g, b), (3, 4, 5, 2)),
        (lambda *a: bn.group_norm(*a, n_groups=1), lambda x, g, b: torch.nn.functional.group_norm(x, 1, g, b), (3, 4, 5)),
        (lambda *a: bn.group_norm(*a, n_groups=4), lambda x, g, b: torch.nn.functional.instance_norm(x, weight=g, bias=b), (3, 4, 5)),
    ],
)  # fmt: skip
def test_torch_agrees_in_value_and_gradient(ours, theirs, shape):
    rng = np.random.default_rng(0)
    arrays = draw(rng, *shape)
    a, b = [Tensor(x, requires_grad=True) for x in arrays], [torch.tensor(x, requires_grad=True) for x in arrays]
    y, z = ours(*a), theirs(*b)
    np.testing.assert_allclose(y.data, z.detach().numpy(), rtol=1e-8, atol=1e-10)
    cotangent = rng.normal(size=y.shape)
    wanted = torch.autograd.grad(z, b, torch.tensor(cotangent))
    for found, other in zip(grad([y], a, [cotangent]), wanted, strict=True):
        np.testing.assert_allclose(found.data, other.numpy(), rtol=1e-6, atol=1e-8)


@pytest.mark.equation("batchnorm-1d")
def test_batch_norm_couples_the_samples_and_layer_norm_does_not():
    rng = np.random.default_rng(1)
    x, g, b = draw(rng, 5, 3)
    other = x.copy()
    other[1:] += 5 * rng.normal(size=(4, 3))
    one, two = (bn.batch_norm_1d(*map(Tensor, (a, g, b))).data[0] for a in (x, other))
    assert np.abs(one - two).max() > 0.1
    one, two = (layer_norm(*map(Tensor, (a, g, b))).data[0] for a in (x, other))
    np.testing.assert_array_equal(one, two)


@pytest.mark.equation("batchnorm-running")
def test_running_statistics_are_those_of_torch_and_differ_from_the_batch():
    """Erratum 108: training and inference differ, until the average has seen enough batches."""
    rng = np.random.default_rng(2)
    module, running = torch.nn.BatchNorm1d(3).double(), bn.RunningStatistics.fresh(3)
    for _ in range(4):
        x = 2 + 3 * rng.normal(size=(8, 3))
        module(torch.tensor(x))
        running.update(x)
    theirs = {name: array.numpy() for name, array in module.state_dict().items()}
    np.testing.assert_allclose(running.mean, theirs["running_mean"])
    np.testing.assert_allclose(running.variance, theirs["running_var"])
    module.eval()
    ours = running.apply(Tensor(x), Tensor(np.ones(3)), Tensor(np.zeros(3))).data
    np.testing.assert_allclose(ours, module(torch.tensor(x)).detach().numpy())
    trained = bn.batch_norm_1d(Tensor(x), Tensor(np.ones(3)), Tensor(np.zeros(3))).data
    assert np.abs(ours - trained).max() > 0.1
    for _ in range(300):
        running.update(2 + 3 * rng.normal(size=(64, 3)))
    np.testing.assert_allclose(running.mean, 2, atol=0.3)
    np.testing.assert_allclose(running.variance, 9, rtol=0.2)


@pytest.mark.equation("norm-cost", "wn-rmsnorm-speed")
def test_cost_of_the_two_norms():
    """One sum, a subtraction and an addition less. The time is measured and reported; nothing is asserted of it."""
    assert bn.norm_cost("layernorm", 10) == bn.NormCost(2, 70, 20)
    assert bn.norm_cost("rmsnorm", 10) == bn.NormCost(1, 40, 10)
    x, g, b = Tensor(np.ones((64, 512))), Tensor(np.ones(512)), Tensor(np.zeros(512))
    seconds = []
    for norm in (lambda: layer_norm(x, g, b), lambda: rms_norm(x, g)):
        start = time.perf_counter()
        norm()
        seconds.append(time.perf_counter() - start)
    print(f"RMSNorm saves {1 - seconds[1] / seconds[0]:.0%} of LayerNorm's time here, as written")
    assert min(seconds) > 0


x, g = Tensor(np.ones((2, 4, 3))), Tensor(np.ones(4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bn.batch_norm_1d(x, g, g), r"batch_norm_1d: X must be of shape \(B, d\), got shape \(2, 4, 3\)"),
        (lambda: bn.batch_norm_2d(x, g, g), r"batch_norm_2d: X must be of shape \(B, C, H, W\)"),
        (lambda: bn.group_norm(x, g, Tensor(np.ones(3)), 2), r"group_norm: b must be of shape \(4,\), one for each channel"),
        (lambda: bn.group_norm(x, g, g, 3), "group_norm: n_groups must be a divisor of C = 4, got 3"),
        (lambda: bn.group_norm(x, g, g, 0), "group_norm: n_groups must be a positive integer, got 0"),
        (lambda: bn.RunningStatistics.fresh(3, 0.0), r"RunningStatistics: the momentum must be in \(0, 1\], got 0.0"),
        (lambda: bn.RunningStatistics.fresh(3).update(np.ones((4, 2))), r"X must be of shape \(B, C = 3, ...\)"),
        (lambda: bn.RunningStatistics.fresh(3).update(np.ones((1, 3))), "the batch must be at least two values for each channel"),
        (lambda: bn.norm_cost("batchnorm", 3), "norm_cost: the kind must be layernorm or rmsnorm, got batchnorm"),
        (lambda: bn.norm_cost("rmsnorm", 0), "norm_cost: d must be a positive integer, got 0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
