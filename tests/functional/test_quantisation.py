"""Integers in place of numbers: error bounds, exact zeros, packing, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.functional import quantisation as quant

seeds = st.integers(0, 2**32 - 1)
axes = st.sampled_from([None, 0, -1, (0, 2), (-1, -2)])
KINDS = pytest.mark.parametrize("quantise, largest", [(quant.quantise_int8, 127), (quant.quantise_int4, 7)])


def draw(seed):
    rng = np.random.default_rng(seed)
    loudness = 10.0 ** rng.uniform(-6, 6, size=(3, 4, 1))
    return (rng.normal(size=(3, 4, 8)) * loudness).astype(np.float32)


@KINDS
@pytest.mark.equation("int8-quant", "int4-quant", "scale-granularity")
@settings(max_examples=30)
@given(seeds, axes)
def test_the_error_is_at_most_half_a_step(quantise, largest, seed, axis):
    x = draw(seed)
    q = quantise(x, axis)
    assert q.codes.dtype == np.int8 and q.codes.shape == x.shape and q.scale.dtype == np.float32
    assert np.abs(q.codes).max() == largest  # the largest magnitude takes the last level: none is wasted
    np.testing.assert_allclose(q.scale, np.abs(x).max(axis=axis, keepdims=True) / largest, rtol=1e-6)
    assert (np.abs(quant.dequantise(q) - x) <= q.scale / 2 * (1 + 1e-5)).all()


@KINDS
@pytest.mark.equation("int8-quant", "int4-quant")
def test_levels_come_back_exactly_and_ties_go_to_even(quantise, largest):
    levels = np.arange(-largest, largest + 1, dtype=np.float32)
    np.testing.assert_array_equal(quant.dequantise(quantise(levels)), levels)
    ties = np.array([0.5, 1.5, 2.5, -0.5, largest], np.float32)
    np.testing.assert_array_equal(quantise(ties).codes, [0, 2, 2, 0, largest])


@KINDS
@pytest.mark.equation("int8-quant", "int4-quant")
def test_zeros_and_the_smallest_numbers_do_not_divide_by_zero(quantise, largest):
    for x in [np.zeros((2, 3), np.float32), np.full((2, 3), 1e-45, np.float32), np.full((2, 3), 1e-38, np.float32)]:
        q = quantise(x, -1)
        back = quant.dequantise(q)
        assert np.isfinite(back).all() and (np.abs(back - x) <= q.scale / 2).all()


@pytest.mark.equation("int4-quant")
def test_the_step_of_int4_is_the_scale_and_not_a_sixteenth():
    """Erratum 48: integer levels are 1 apart, times the scale."""
    levels = np.unique(quant.dequantise(quant.quantise_int4(np.linspace(-7, 7, 1001, dtype=np.float32))))
    np.testing.assert_array_equal(levels, np.arange(-7, 8))
    assert (np.diff(levels) == 1).all()


@pytest.mark.equation("scale-granularity")
def test_a_scale_for_each_row_never_widens_the_bound_and_helps_quiet_rows():
    x = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32) * np.float32([[1], [1e-1], [1e-2], [1e-3]])
    whole, rows = quant.quantise_int8(x), quant.quantise_int8(x, -1)
    assert (rows.scale <= whole.scale).all()
    error = [np.abs(quant.dequantise(q) - x).mean(-1) / np.abs(x).mean(-1) for q in (whole, rows)]
    assert error[0][0] == pytest.approx(error[1][0], rel=0.2)  # the loud row: nothing gained
    assert error[0][3] > 0.9 and error[1][3] < 0.02  # the quiet one: lost, and saved


@pytest.mark.equation("int4-quant")
@settings(max_examples=30)
@given(seeds, st.integers(0, 9))
def test_two_codes_to_a_byte_and_back(seed, n):
    codes = np.random.default_rng(seed).integers(-8, 8, (3, n)).astype(np.int8)
    packed = quant.pack_int4(codes)
    assert packed.shape == (3, (n + 1) // 2) and packed.dtype == np.uint8
    np.testing.assert_array_equal(quant.unpack_int4(packed, n), codes)


@pytest.mark.equation("int4-quant")
def test_the_even_code_lies_in_the_low_half():
    np.testing.assert_array_equal(quant.pack_int4(np.array([1, -1, 7], np.int8)), [0xF1, 0x07])


@pytest.mark.equation("quant-asymmetric")
@settings(max_examples=40)
@given(seeds, st.integers(2, 8), axes, st.sampled_from([-50.0, 0.0, 50.0]))
def test_asymmetric_zero_is_exact_and_the_error_half_a_step(seed, bits, axis, shift):
    x = (np.random.default_rng(seed).normal(size=(3, 4, 8)) + shift).astype(np.float32)
    x[0, 0, 0] = 0
    q = quant.quantise_asymmetric(x, bits, axis)
    back = quant.dequantise_asymmetric(q)
    assert back[0, 0, 0] == 0
    assert q.codes.max() < 2**bits and ((q.zero >= 0) & (q.zero < 2**bits)).all()
    assert (np.abs(back - x) <= q.scale / 2 * (1 + 1e-4)).all()  # at the clipped ends too: z is half a step off at most


@pytest.mark.equation("quant-asymmetric")
def test_a_range_without_zero_is_widened_and_a_lopsided_one_gains_over_the_symmetric():
    x = np.random.default_rng(0).uniform(3, 5, 1000).astype(np.float32)
    q = quant.quantise_asymmetric(x)
    assert q.zero.item() == 0 and q.scale.item() == pytest.approx(x.max() / 255)
    relu = np.maximum(np.random.default_rng(1).normal(size=1000), 0).astype(np.float32)
    error = np.abs(quant.dequantise_asymmetric(quant.quantise_asymmetric(relu)) - relu).mean()
    assert error < 0.6 * np.abs(quant.dequantise(quant.quantise_int8(relu)) - relu).mean()
    assert not quant.dequantise_asymmetric(quant.quantise_asymmetric(np.zeros(3, np.float32))).any()


@pytest.mark.parametrize("quantise", [quant.quantise_int8, quant.quantise_int4, quant.quantise_asymmetric])
def test_bad_numbers_and_axes_are_refused(quantise):
    name = quantise.__name__
    for x in [np.array([1.0, np.nan]), np.array([np.inf, 0])]:
        with pytest.raises(ValueError, match=f"{name}: x must be finite, got NaN or infinity"):
            quantise(x)
    with pytest.raises(ValueError, match=f"{name}: x must be an array with at least one number"):
        quantise(np.zeros((0, 3)))
    with pytest.raises(ValueError, match=f"{name}: x must be an array of floating-point numbers"):
        quantise(np.arange(3))
    for axis in [2, (0, -2), "rows"]:
        with pytest.raises(ValueError, match=f"{name}: axis must be None or different axes of an array with 2"):
            quantise(np.ones((2, 2)), axis=axis)


def test_other_bad_input_is_refused():
    ones = np.ones((2, 3), np.float32)
    q = quant.quantise_int8(ones)
    with pytest.raises(ValueError, match="dequantise: the scales must be broadcastable"):
        quant.dequantise(quant.Quantised(q.codes, np.ones((2, 2), np.float32)))
    a = quant.quantise_asymmetric(ones)
    with pytest.raises(ValueError, match="dequantise_asymmetric: scales and zeros must be broadcastable"):
        quant.dequantise_asymmetric(a._replace(zero=np.zeros(5, np.int32)))
    for bits in (1, 9):
        with pytest.raises(ValueError, match="quantise_asymmetric: bits must be one of 2, 3"):
            quant.quantise_asymmetric(ones, bits)
    with pytest.raises(ValueError, match="pack_int4: codes must be an int8 array"):
        quant.pack_int4(np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="pack_int4: codes must be from -8 to 7"):
        quant.pack_int4(np.array([8], np.int8))
    with pytest.raises(ValueError, match="unpack_int4: packed must be a uint8 array with 2 bytes to a row"):
        quant.unpack_int4(np.zeros(3, np.uint8), 4)
    with pytest.raises(ValueError, match="unpack_int4: n must be a non-negative integer"):
        quant.unpack_int4(np.zeros(3, np.uint8), -1)
