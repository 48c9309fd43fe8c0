"""Learning-rate schedules: their values at the joints, and a sum of worked points."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.optim.schedules import (
    SCHEDULES,
    cosine,
    inverse_sqrt,
    linear,
    noam,
    schedule,
    warmup,
    warmup_stable_decay,
)

LR, T_W, T_S, T_MAX, LR_MIN = 0.3, 10, 60, 100, 0.03
ALL = {
    "cosine": lambda t: cosine(t, LR, T_W, T_MAX, LR_MIN),
    "linear": lambda t: linear(t, LR, T_W, T_MAX, LR_MIN),
    "inverse": lambda t: inverse_sqrt(t, LR, T_W),
    "wsd": lambda t: warmup_stable_decay(t, LR, T_W, T_S, T_MAX, LR_MIN),
}


@pytest.mark.equation("lr-warmup")
def test_warm_up_is_a_straight_line_to_the_full_rate():
    np.testing.assert_allclose([warmup(t, LR, T_W) for t in (0, 1, 5, 10, 99)], [0, 0.03, 0.15, 0.3, 0.3])


@pytest.mark.equation("lr-warmup", "lr-linear-invsqrt-wsd", "lr-cosine")
@pytest.mark.parametrize("name", ALL)
def test_every_schedule_warms_up_and_peaks_at_the_rate(name):
    rates = [ALL[name](t) for t in range(200)]
    assert max(rates) == pytest.approx(LR) and rates[T_W] == pytest.approx(LR)
    np.testing.assert_allclose(rates[: T_W + 1], [warmup(t, LR, T_W) for t in range(T_W + 1)])
    assert (np.diff(rates[T_W:]) <= 1e-15).all()


@pytest.mark.equation("lr-cosine", "lr-linear-invsqrt-wsd")
@pytest.mark.parametrize("name", ALL)
def test_every_schedule_is_continuous_at_its_joints(name):
    for joint in (T_W, T_S, T_MAX):
        for t in (joint - 1e-9, joint + 1e-9):
            assert ALL[name](t) == pytest.approx(ALL[name](joint), abs=1e-8)


@pytest.mark.equation("lr-cosine")
def test_cosine_at_the_joints_and_in_the_middle():
    assert cosine(T_W, LR, T_W, T_MAX, LR_MIN) == pytest.approx(LR)
    assert cosine((T_W + T_MAX) / 2, LR, T_W, T_MAX, LR_MIN) == pytest.approx((LR + LR_MIN) / 2)
    assert cosine(T_W + 30, LR, T_W, T_MAX, LR_MIN) == pytest.approx(LR_MIN + 0.5 * (LR - LR_MIN) * 1.5)  # cos 60°
    assert [cosine(t, LR, T_W, T_MAX, LR_MIN) for t in (100, 101, 10**6)] == [LR_MIN] * 3


@pytest.mark.equation("lr-cosine")
def test_cosine_equals_torch():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=T_MAX - T_W, eta_min=LR_MIN)
    for t in range(T_W, T_MAX + 1):
        assert cosine(t, LR, T_W, T_MAX, LR_MIN) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.equation("lr-linear-invsqrt-wsd")
def test_the_other_schedules_at_worked_points():
    assert linear(55, LR, T_W, T_MAX, LR_MIN) == pytest.approx(0.165)
    assert linear(100, LR, T_W, T_MAX, LR_MIN) == linear(500, LR, T_W, T_MAX, LR_MIN) == LR_MIN
    assert inverse_sqrt(40, LR, T_W) == pytest.approx(LR / 2)
    stable = [warmup_stable_decay(t, LR, T_W, T_S, T_MAX, LR_MIN) for t in (10, 35, 60, 80, 100)]
    np.testing.assert_allclose(stable, [0.3, 0.3, 0.3, 0.165, 0.03])


@pytest.mark.equation("lr-linear-invsqrt-wsd")
def test_the_noam_form_peaks_at_the_rate_over_the_root_of_the_warm_up():
    rates = [noam(t, LR, T_W) for t in range(1, 100)]
    assert int(np.argmax(rates)) + 1 == T_W and max(rates) == pytest.approx(LR * T_W**-0.5)
    for t in (3, 10, 77):
        assert noam(t, LR, T_W) == pytest.approx(LR * min(t**-0.5, t * T_W**-1.5))


@given(st.sampled_from(SCHEDULES), st.integers(1, 400), st.integers(0, 400), st.floats(0, 1))
@settings(max_examples=50)
def test_by_name_every_rate_of_a_run_is_positive_and_at_most_the_peak(kind, steps, warmup_steps, lr_min):
    rate = schedule(kind, 1.0, min(warmup_steps, steps), steps, lr_min)
    rates = [rate(t) for t in range(1, steps + 1)]
    assert (all(0 <= r <= 1.0 for r in rates) and rates[0] > 0) or steps == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cosin", 0.1, 1, 10), "one of 'constant', 'cosine'"),
        (("cosine", -0.1, 1, 10), "lr must be a non-negative number"),
        (("cosine", 0.1, 11, 10), "warmup_steps must be at most the number of steps, 10, got 11"),
        (("cosine", 0.1, 1, 0), "steps must be a positive integer"),
        (("cosine", 0.1, 1, 10, 0.2), r"lr_min must be in \[0, lr = 0.1\]"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedule(*arguments)
