"""Products in FP8: scaling, the error against its bound, the recipe."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data.float_formats import decode_float, float_format, round_float
from minillm.functional import fp8_gemm as fp8

seeds = st.integers(0, 2**32 - 1)


def draw(seed, rows=(5, 33, 7)):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=rows[:2]) * 10.0 ** rng.uniform(-5, 5, (rows[0], 1))
    return w.astype(np.float32), (rng.normal(size=rows[1:]) * 10.0 ** rng.uniform(-9, 9)).astype(np.float32)


@pytest.mark.equation("fp8-scaling")
@settings(max_examples=30)
@given(seeds, st.sampled_from(fp8.FP8), st.sampled_from([None, 0, -1]))
def test_nothing_overflows_and_normals_keep_their_relative_accuracy(seed, name, axis):
    x, f = draw(seed)[0], float_format(name)
    cast = fp8.cast_fp8(x, name, axis)
    scaled = decode_float(cast.codes, name)
    assert np.isfinite(scaled).all() and np.abs(scaled).max() == f.largest
    normal = np.abs(x) * cast.scale.astype(np.float64) >= f.smallest_normal
    error = np.abs(fp8.uncast_fp8(cast) - x)
    assert (error <= np.abs(x) * 2.0 ** -(f.mantissa + 1) * (1 + 1e-6))[normal].all()
    assert (error <= f.smallest_subnormal / 2 / cast.scale * (1 + 1e-6))[~normal].all()


@pytest.mark.equation("fp8-scaling")
def test_without_a_scale_numbers_vanish_or_overflow():
    x = np.array([1e-4, 3e3], np.float32)
    np.testing.assert_array_equal(round_float(x, "fp8_e4m3"), [0, np.nan])
    small = fp8.uncast_fp8(fp8.cast_fp8(x[:1]))
    np.testing.assert_allclose(small, x[:1], rtol=1e-6)
    for value, within in [(0.0, 0.0), (1e-45, 1.0), (1e-30, 1e-6), (3e38, 1e-6)]:
        x = np.full((2, 2), value, np.float32)
        np.testing.assert_allclose(fp8.uncast_fp8(fp8.cast_fp8(x, axis=-1)), x, rtol=within)


@pytest.mark.equation("fp8-gemm", "fp8-scaling")
@settings(max_examples=40)
@given(seeds, st.booleans())
def test_the_error_stays_below_the_bound(seed, per_channel):
    w, x = draw(seed)
    exact = w.astype(np.float64) @ x.astype(np.float64)
    error = np.abs(fp8.fp8_gemm(w, x, per_channel=per_channel) - exact)
    bound = fp8.fp8_gemm_bound(w, x, per_channel=per_channel)
    assert (error <= bound).all()
    assert (error > bound / 1000).any()  # and the bound says something


@pytest.mark.equation("fp8-gemm")
def test_powers_of_two_multiply_exactly():
    w = 2.0 ** np.random.default_rng(0).integers(-3, 3, (4, 8)).astype(np.float32)
    x = 2.0 ** np.random.default_rng(1).integers(-3, 3, (8, 5)).astype(np.float32)
    w[:, 0] = x[0, 0] = 7.0  # the largest of every row, 1.75 times a power of two as 448 is: so the factor is one
    for axis in (None, -1):
        found = fp8.multiply_fp8(fp8.cast_fp8(w, axis=axis), fp8.cast_fp8(x))
        np.testing.assert_array_equal(found, w @ x)


@pytest.mark.equation("scale-granularity", "fp8-gemm")
def test_a_scale_for_each_channel_helps_only_where_one_for_all_reaches_the_subnormals():
    rng = np.random.default_rng(0)
    loudness = np.array([1.0, 1e-2, 1e-5, 1e-7])
    w = (rng.normal(size=(4, 256)) * loudness[:, None]).astype(np.float32)
    x = rng.normal(size=(256, 64)).astype(np.float32)
    exact = w.astype(np.float64) @ x
    error = {}
    for per_channel in (False, True):
        gap = fp8.fp8_gemm(w, x, per_channel=per_channel) - exact
        error[per_channel] = np.sqrt((gap**2).mean(-1) / (exact**2).mean(-1))
    assert error[False][0] == pytest.approx(error[True][0], rel=0.2)
    assert error[False][1] == pytest.approx(error[True][1], rel=0.2)  # a hundred times quieter and still normal
    assert error[False][2] > 2 * error[True][2]
    assert error[False][3] == 1.0 and error[True][3] < 0.05


@pytest.mark.equation("fp8-recipe")
def test_forward_in_e4m3_and_backward_in_e5m2():
    assert (fp8.fp8_format_of("forward"), fp8.fp8_format_of("backward")) == ("fp8_e4m3", "fp8_e5m2")
    rng = np.random.default_rng(0)
    w, x, do = (rng.normal(size=s).astype(np.float32) for s in [(6, 40), (40, 9), (6, 9)])
    do *= (10.0 ** rng.uniform(-4, 0, do.shape)).astype(np.float32)
    dw, dx = fp8.fp8_gemm_backward(w, x, do)
    for found, exact in [(dw, do @ x.T), (dx, w.T @ do)]:
        assert found.shape == exact.shape
        assert 0 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 2.0**-3
    spread = 10.0 ** np.linspace(-7, 0, 50, dtype=np.float32)  # as gradients are
    lost = {name: (fp8.uncast_fp8(fp8.cast_fp8(spread, name)) == 0).sum() for name in fp8.FP8}
    assert lost["fp8_e4m3"] > lost["fp8_e5m2"] == 0


@pytest.mark.equation("fp8-recipe")
def test_the_delayed_scale_follows_the_history_and_saturates_on_a_jump():
    delayed = fp8.DelayedScale(history=3)
    assert delayed.scale == 1.0
    for amax, expected in [(2.0, 224.0), (4.0, 112.0), (1.0, 112.0), (1.0, 112.0), (1.0, 448.0)]:
        delayed.cast(np.array([amax, -0.5], np.float32))
        assert delayed.scale == expected
    jumped = delayed.cast(np.array([[8.0, 0.5]], np.float32))
    np.testing.assert_array_equal(fp8.uncast_fp8(jumped), [[1.0, 0.5]])  # cut at what the history knew
    assert delayed.scale == 56.0
    assert fp8.DelayedScale(margin=2.0).scale == 1.0
    roomy = fp8.DelayedScale(margin=2.0)
    roomy.cast(np.ones(1, np.float32))
    assert roomy.scale == 224.0


def test_bad_input_is_refused():
    w, x = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    for call in (fp8.fp8_gemm, fp8.fp8_gemm_bound):
        with pytest.raises(ValueError, match=f"{call.__name__}: the inputs must be matrices"):
            call(w, w)
    with pytest.raises(ValueError, match="fp8_gemm_backward: the inputs must be matrices"):
        fp8.fp8_gemm_backward(w, w, w)
    with pytest.raises(ValueError, match=r"fp8_gemm_backward: the gradient must be of shape \(2, 4\)"):
        fp8.fp8_gemm_backward(w, x, w)
    with pytest.raises(ValueError, match="multiply_fp8: the scales must be constant along d_in"):
        fp8.multiply_fp8(fp8.cast_fp8(w, axis=0), fp8.cast_fp8(x))
    with pytest.raises(ValueError, match="multiply_fp8: the inputs must be matrices"):
        fp8.multiply_fp8(fp8.cast_fp8(w), fp8.cast_fp8(w))
    with pytest.raises(ValueError, match="fp8_scale: the format must be one of 'fp8_e4m3', 'fp8_e5m2', got fp16"):
        fp8.cast_fp8(w, "fp16")
    with pytest.raises(ValueError, match="fp8_scale: x must be finite"):
        fp8.fp8_gemm(w * np.nan, x)
    with pytest.raises(ValueError, match="fp8_scale: x must be floating-point numbers, at least one"):
        fp8.fp8_scale(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="fp8_scale: axis must be None or an axis of 2"):
        fp8.fp8_scale(w, axis=2)
    with pytest.raises(ValueError, match="cast_fp8: scale must be broadcastable"):
        fp8.cast_fp8(w, scale=np.ones((2, 2), np.float32))
    for bad in (0.0, np.inf, -1.0):
        with pytest.raises(ValueError, match="cast_fp8: scale must be positive and finite"):
            fp8.cast_fp8(w, scale=np.full((1, 1), bad, np.float32))
    with pytest.raises(ValueError, match="fp8_format_of: the direction must be one of 'forward', 'backward'"):
        fp8.fp8_format_of("up")
    with pytest.raises(ValueError, match="DelayedScale: the format must be one of"):
        fp8.DelayedScale("bf16")
    with pytest.raises(ValueError, match="DelayedScale: history must be a positive integer"):
        fp8.DelayedScale(history=0)
    with pytest.raises(ValueError, match="DelayedScale: margin must be a positive number"):
        fp8.DelayedScale(margin=0)
