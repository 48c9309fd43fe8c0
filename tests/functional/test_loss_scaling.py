"""Loss scaling, master weights and the policy: what is lost without them, in numbers."""

import numpy as np
import pytest
import torch

from minillm.autograd import Tensor, grad
from minillm.data.float_formats import round_float
from minillm.functional import loss_scaling as scaling


@pytest.mark.equation("loss-scaling")
def test_a_small_gradient_survives_in_float16_only_when_scaled():
    small = np.array([1e-8, 3.0])
    assert round_float(small, "fp16")[0] == 0
    scale = 2.0**16
    with np.errstate(over="ignore"):
        kept = round_float(small[:1] * scale, "fp16")
    assert scaling.unscale_gradients([kept], scale)[0] == pytest.approx([1e-8], rel=1e-3)


@pytest.mark.equation("loss-scaling")
@pytest.mark.parametrize("scale", [1.0, 1024.0, 2.0**16])
def test_scaling_and_unscaling_by_a_power_of_two_changes_nothing(scale):
    w = Tensor(np.random.default_rng(0).normal(size=5).astype(np.float32), requires_grad=True)
    (plain,) = grad((w * w).sum(), [w])
    (scaled,) = grad(scaling.scale_loss((w * w).sum(), scale), [w])
    np.testing.assert_array_equal(scaled.data, plain.data * np.float32(scale))
    np.testing.assert_array_equal(scaling.unscale_gradients([scaled.data], scale)[0], plain.data)


@pytest.mark.equation("dynamic-loss-scaling")
def test_overflow_skips_and_halves_and_good_steps_double():
    scale = scaling.DynamicLossScale(8.0, interval=3)
    good, bad = [np.ones(2, np.float32) * 8], [np.ones(2), np.array([1.0, np.inf])]
    assert scale.unscale(bad) is None and scale.scale == 4
    assert scale.unscale([np.array([np.nan])]) is None and scale.scale == 2
    for _ in range(2):
        np.testing.assert_array_equal(scale.unscale(good)[0], [4, 4])
    assert scale.unscale(bad) is None and scale.scale == 1  # and the count of good steps starts again
    assert scale.unscale(bad) is None and scale.scale == 1  # not below the smallest
    for expected in (1, 1, 2, 2, 2, 4):
        scale.unscale(good)
        assert scale.scale == expected


@pytest.mark.equation("dynamic-loss-scaling")
def test_torch_keeps_the_same_scale():
    pattern = np.random.default_rng(0).random(60) < 0.2
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    ours = scaling.DynamicLossScale(1024.0, interval=4, smallest=2.0**-40)
    w = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=0.1)
    for bad in pattern:
        theirs.scale(w.sum()).backward()
        w.grad = w.grad * (np.inf if bad else 1.0)
        before = w.item()
        gradients = ours.unscale([w.grad.numpy().copy()])
        theirs.step(optimizer)
        theirs.update()
        assert (gradients is None) == bad == (w.item() == before)
        assert ours.scale == theirs.get_scale()
        optimizer.zero_grad()


@pytest.mark.equation("dynamic-loss-scaling")
def test_the_scale_is_restored_with_its_count():
    a, b = scaling.DynamicLossScale(8.0, interval=3), scaling.DynamicLossScale(1.0, interval=3)
    a.unscale([np.ones(1)])
    b.load_state_dict(a.state_dict())
    for scale in (a, b):
        scale.unscale([np.ones(1)])
        scale.unscale([np.ones(1)])
    assert a.scale == b.scale == 16
    for state in (
        {},
        {"scale": 0.0, "good_steps": 0},
        {"scale": 1.0, "good_steps": 3},
        {"scale": 1.0, "good_steps": -1},
    ):
        with pytest.raises(ValueError, match=r"DynamicLossScale\.load_state_dict: "):
            b.load_state_dict(state)


@pytest.mark.equation("master-weights")
def test_small_updates_add_up_in_the_master_copy_only():
    assert round_float(1 + 1e-4, "bf16") == 1 and np.float32(1 + 1e-4) > 1
    master, low = np.ones(1, np.float32), np.ones(1, np.float32)
    for _ in range(100):
        master, copy = scaling.update_master(master, np.full(1, 1e-4, np.float32))
        low = round_float(low + np.float32(1e-4), "bf16")
    assert low == 1 and master == pytest.approx([1.01], rel=1e-5) and copy == round_float(np.float32(1.01), "bf16")
    rng = np.random.default_rng(0)  # stochastic rounding is the other remedy: right on average
    many = np.ones(2000, np.float32)
    for _ in range(100):
        many = round_float(many + np.float32(1e-4), "bf16", rounding="stochastic", rng=rng)
    assert many.mean() == pytest.approx(1.01, abs=1e-3)


@pytest.mark.equation("mixed-precision-policy")
def test_policy():
    assert scaling.precision_of("matmul") == "bf16" and scaling.precision_of("matmul", "fp16") == "fp16"
    for operation in ("softmax", "norm", "reduction", "loss", "optimizer", "master weights"):
        assert scaling.precision_of(operation, "fp16") == "fp32"


@pytest.mark.equation("mixed-precision-policy")
def test_why_reductions_run_in_float32():
    total = np.float32(0)
    for _ in range(1000):
        total = round_float(total + np.float32(1), "bf16")
    assert total == 256  # the next one is half a step and goes to even


@pytest.mark.equation("tf32", "mixed-precision-policy")
@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16", "fp32"])
def test_low_precision_product_stays_within_its_bound(name):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 50)), rng.normal(size=(50, 9))
    bits = {"tf32": 10, "bf16": 7, "fp16": 10, "fp32": 23}[name]
    u = 2.0 ** -(bits + 1)
    bound = np.abs(a) @ np.abs(b) * (2 * u + u * u + 52 * 2.0**-24)
    error = np.abs(scaling.low_precision_matmul(a, b, name) - a @ b)
    assert (error <= bound).all() and (name == "fp32" or error.max() > bound.max() / 100)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="scale_loss: the loss must be a single number"):
        scaling.scale_loss(Tensor(np.ones(2)), 2.0)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale_loss: the scale must be a positive number"):
            scaling.scale_loss(Tensor(np.ones(())), bad)
        with pytest.raises(ValueError, match="unscale_gradients: the scale must be a positive number"):
            scaling.unscale_gradients([np.ones(2)], bad)
        with pytest.raises(ValueError, match="DynamicLossScale: scale must be a positive number"):
            scaling.DynamicLossScale(bad)
    with pytest.raises(ValueError, match="DynamicLossScale: interval must be a positive integer"):
        scaling.DynamicLossScale(interval=0)
    with pytest.raises(ValueError, match="DynamicLossScale: smallest must be a positive number"):
        scaling.DynamicLossScale(smallest=0)
    ones = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="update_master: the master weights must be in float32"):
        scaling.update_master(ones.astype(np.float16), ones)
    with pytest.raises(ValueError, match=r"update_master: the step must be of shape \(2,\)"):
        scaling.update_master(ones, np.ones(3, np.float32))
    with pytest.raises(ValueError, match="float_format: the format must be one of"):
        scaling.update_master(ones, ones, "fp4")
    with pytest.raises(ValueError, match="precision_of: the operation must be one of 'matmul'"):
        scaling.precision_of("sort")
    with pytest.raises(ValueError, match="low_precision_matmul: the inputs must be matrices"):
        scaling.low_precision_matmul(np.ones((2, 3)), np.ones((2, 3)))
