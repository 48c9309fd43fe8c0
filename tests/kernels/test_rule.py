"""The tolerance rule, calibrated: honest variants of an algorithm practically never fail it, small mistakes do."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch.nn import functional as F

from kernels.norm import problems
from kernels.norm.properties import expectations
from kernels.subject import Subject, execute
from kernels.tolerance import Expectation, Verdict, judge, moved, rounded
from kernels.universal import judged


def rms(x, g, eps):
    return F.rms_norm(x, x.shape[-1:], g, eps)


def layer(x, g, b, eps):
    return F.layer_norm(x, x.shape[-1:], g, b, eps)


def backwards_rms(x, g, eps):
    """Sums from right to left, one element after the other."""
    xf = x.float()
    mean = xf.square().flip(-1).cumsum(-1)[..., -1:] / x.shape[-1]
    return (xf * torch.rsqrt(mean + eps) * g.float()).to(x.dtype)


def backwards_layer(x, g, b, eps):
    xf = x.float()
    c = xf - xf.flip(-1).cumsum(-1)[..., -1:] / x.shape[-1]
    variance = c.square().flip(-1).cumsum(-1)[..., -1:] / x.shape[-1]
    return (c * torch.rsqrt(variance + eps) * g.float() + b.float()).to(x.dtype)


def unrounded_sum(x, r, g, b, eps):
    s = x.float() + r.float()
    return s.to(x.dtype), backwards_layer(s, g, b, eps).to(x.dtype)


def ratios(function, name, dtype, draws):
    """measured / allowed of the worst result, for many problems."""
    subject = Subject({name: function}, "cpu", "torch", ours=False)
    found = []

    @seed(1)
    @settings(max_examples=draws, deadline=None, database=None, phases=(Phase.generate,), derandomize=False,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(problems.problems(name, dtype, False))
    def run(problem):
        result = execute(subject, problem)
        found.append(max(v.ratio for v in judged(result.outputs + result.gradients, expectations(problem))))

    run()
    print(f"{name} {dtype}: worst {max(found):.2f} of the allowance in {len(found)} draws")
    return np.array(found)


HONEST = [
    (rms, "rms_norm", "float32"), (layer, "layer_norm", "float32"), (backwards_rms, "rms_norm", "float32"),
    (backwards_layer, "layer_norm", "float32"), (backwards_rms, "rms_norm", "float16"),
    (backwards_layer, "layer_norm", "float16"), (unrounded_sum, "add_layer_norm", "float16"),
    (backwards_rms, "rms_norm", "bfloat16"), (unrounded_sum, "add_layer_norm", "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "name", "dtype"), HONEST)
def test_honest_variants_pass(function, name, dtype):
    assert (ratios(function, name, dtype, 50) <= 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(("function", "name", "dtype"), HONEST)
def test_honest_variants_pass_on_many_draws(function, name, dtype):
    assert (ratios(function, name, dtype, 400) <= 1).all()


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        (lambda x, g, eps: rms(x, g, eps) * (1 + 2e-5), "rms_norm"),
        (lambda x, g, eps: rms(x, g, 2 * eps), "rms_norm"),
        (lambda x, g, b, eps: layer(x, g, b, eps) + 1e-5, "layer_norm"),
    ],
)
def test_small_mistakes_fail(mistake, name):
    assert (ratios(mistake, name, "float32", 50) > 1).mean() > 0.2


# ---- the parts


def test_bfloat16_rounding_is_torchs():
    values = np.random.default_rng(0).standard_normal(2000) * 10.0 ** np.arange(-10, 10).repeat(100)
    expected = torch.from_numpy(values.astype(np.float32)).bfloat16().double().numpy()
    assert np.array_equal(rounded(values.astype(np.float32), "bfloat16"), expected)
    assert np.isnan(rounded(np.array([np.nan]), "bfloat16")).all()


def test_a_move_is_one_ulp():
    values = np.array([1.0, 1.5, -3.0, 1e-3, 0.0])
    near = moved(values, "float32", np.random.default_rng(0)).astype(np.float32)
    steps = np.abs(near.view(np.int32).astype(np.int64) - values.astype(np.float32).view(np.int32))
    assert steps.tolist() == [1, 1, 1, 1, 0] or (steps[0] == 2 and near[0] < 1)  # below 1 the ulp is half as large


@pytest.mark.parametrize(
    ("actual", "passes"),
    [([1.0, 2.0], True), ([1.0, 2.05], True), ([1.0, 2.2], False), ([np.nan, 2.0], False), ([np.inf, 2.0], False)],
)
def test_judgement(actual, passes):
    expected = Expectation("y", np.array([1.0, 2.0]), np.array(0.1), 0.1)
    assert judge(np.array(actual), expected).passed is passes


def test_a_drift_below_the_largest_error_is_seen():
    expected = Expectation("y", np.zeros(100), np.array(1.0), 0.1)
    spike = np.zeros(100)
    spike[0] = 0.9
    assert judge(spike, expected).passed
    drift = judge(np.full(100, 0.2), expected)
    assert not drift.passed
    assert "rms" in drift.name


def test_not_a_number_is_right_where_the_truth_is_not_a_number():
    expected = Expectation("y", np.array([np.nan]), np.array(0.0), 0.0)
    assert judge(np.array([np.nan]), expected).passed
    assert not judge(np.array([1.0]), expected).passed


def test_another_shape_fails():
    assert not judge(np.zeros(3), Expectation("y", np.zeros(2), np.array(1.0), 1.0)).passed


def test_ratio_of_nothing():
    assert Verdict("y", 0.0, 0.0).ratio == 0.0
    assert Verdict("y", 1.0, 0.0).ratio == np.inf
