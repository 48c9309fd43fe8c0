"""Formats bit by bit: every pattern against NumPy and ml_dtypes, rounding, limits, errata."""

from fractions import Fraction

import numpy as np
import pytest

from minillm.data.float_formats import FORMATS, decode_float, encode_float, float_format, round_float, ulp

ml_dtypes = pytest.importorskip("ml_dtypes")
THEIRS = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}
SHORT = ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"]
ALL = pytest.mark.parametrize("name", FORMATS)
IDS = pytest.mark.equation("float-format", "fp16", "bf16", "fp8-e4m3", "fp8-e5m2", "rounding-modes")


def patterns(name):
    f = FORMATS[name]
    return np.arange(2**f.bits, dtype=f.storage)


def same(ours, theirs):
    """Equal numbers, zeros with their signs, and NaN where there is NaN."""
    np.testing.assert_array_equal(ours, theirs)
    numbers = ~np.isnan(ours)
    np.testing.assert_array_equal(np.signbit(ours[numbers]), np.signbit(theirs[numbers]))


@IDS
@pytest.mark.parametrize("name", SHORT)
def test_every_pattern_decodes_as_the_oracle_does(name):
    theirs = patterns(name).view(THEIRS[name]).astype(np.float32)
    same(decode_float(patterns(name), name), theirs)


@IDS
@pytest.mark.parametrize("name", SHORT)
def test_every_number_encodes_to_its_own_pattern(name):
    values = decode_float(patterns(name), name)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(encode_float(values, name)[numbers], patterns(name)[numbers])
    assert np.isnan(decode_float(encode_float(values[~numbers], name), name)).all()


@IDS
@pytest.mark.parametrize("name", SHORT)
def test_halfway_points_and_their_neighbours_round_as_the_oracle_does(name):
    """Between every two neighbours: the middle, which goes to the even one, and the numbers beside the middle."""
    values = np.unique(decode_float(patterns(name), name))
    values = values[np.isfinite(values)].astype(np.float64)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)  # exact: one bit more than the format has
    edge = np.float32(values[-1] + ulp(values[-1], name) / 2)
    middle = np.concatenate([middle, [edge, -edge]])
    points = np.concatenate([middle, np.nextafter(middle, np.float32(9e9)), np.nextafter(middle, np.float32(-9e9))])
    with np.errstate(over="ignore"):
        theirs = points.astype(THEIRS[name]).astype(np.float32)
    same(round_float(points, name), theirs)


@IDS
@pytest.mark.equation("fp32")
@pytest.mark.parametrize("name", THEIRS)
def test_random_float32_patterns_round_as_the_oracle_does(name):
    x = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        same(round_float(x, name), x.astype(THEIRS[name]).astype(np.float32))


@pytest.mark.slow
@pytest.mark.equation("bf16", "fp16", "fp8-e4m3", "fp8-e5m2")
@pytest.mark.parametrize("name", SHORT)
def test_every_sixty_fourth_float32_rounds_as_the_oracle_does(name):
    for start in range(0, 2**32, 2**28):
        x = np.arange(start + 31, start + 2**28, 64 * 7, dtype=np.uint64).astype(np.uint32).view(np.float32)
        with np.errstate(all="ignore"):
            same(round_float(x, name), x.astype(THEIRS[name]).astype(np.float32))


@pytest.mark.equation("fp32", "fp16")
def test_float64_is_rounded_once():
    """By way of float32 this number would land on a tie and go the wrong way."""
    x = 1 + 2.0**-11 + 2.0**-40
    assert round_float(x, "fp16") == 1 + 2.0**-10
    assert round_float(np.float32(x), "fp16") == 1
    x = np.random.default_rng(1).normal(size=10_000) * 10.0 ** np.random.default_rng(2).uniform(-46, 39, 10_000)
    with np.errstate(all="ignore"):
        same(round_float(x, "fp32"), x.astype(np.float32))


@pytest.mark.equation("tf32", "wn-tf32-bits")
def test_tf32_has_nineteen_bits_and_keeps_the_upper_ones_of_float32():
    assert FORMATS["tf32"].bits == 19
    codes = np.random.default_rng(0).integers(0, 2**19, 100_000, dtype=np.uint32)
    same(decode_float(codes, "tf32"), (codes << 13).view(np.float32))
    values = decode_float(codes, "tf32")
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(encode_float(values, "tf32")[numbers], codes[numbers])
    x = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    bits = x.view(np.uint32)  # rounding to nearest even by hand, as a device would
    by_hand = ((bits + 0xFFF + (bits >> 13 & 1)) & ~np.uint32(0x1FFF)).view(np.float32)
    np.testing.assert_array_equal(round_float(x, "tf32"), by_hand)


@pytest.mark.equation("float-format-table", "wn-formats", "fp32", "fp16", "bf16", "tf32", "fp8-e4m3", "fp8-e5m2")
@pytest.mark.parametrize(
    "name, bits, exponent, mantissa, normal, subnormal, largest",
    [
        ("fp32", 32, 8, 23, 1.17549e-38, 1.40130e-45, 3.40282e38),
        ("fp16", 16, 5, 10, 6.10352e-5, 5.96046e-8, 65504),
        ("bf16", 16, 8, 7, 1.17549e-38, 9.18355e-41, 3.38953e38),
        ("tf32", 19, 8, 10, 1.17549e-38, 1.14794e-41, 3.40116e38),
        ("fp8_e4m3", 8, 4, 3, 0.015625, 0.001953125, 448),
        ("fp8_e5m2", 8, 5, 2, 6.10352e-5, 1.52588e-5, 57344),
    ],
)
def test_the_table_of_formats(name, bits, exponent, mantissa, normal, subnormal, largest):
    f = float_format(name)
    assert (f.bits, f.exponent, f.mantissa, f.ulp_at_one) == (bits, exponent, mantissa, 2.0**-mantissa)
    found = (f.smallest_normal, f.smallest_subnormal, f.largest)
    np.testing.assert_allclose(found, (normal, subnormal, largest), rtol=5e-6)
    assert decode_float(np.array([1], f.storage), name)[0] == f.smallest_subnormal
    assert decode_float(np.array([1 << mantissa], f.storage), name)[0] == f.smallest_normal


@pytest.mark.equation("float-format-table", "fp8-e4m3", "fp8-e5m2")
def test_the_quoted_lower_ends_of_fp8_are_zero_in_the_format():
    """Erratum 47: 9.2e-8 and 3.0e-10 are far below the smallest subnormals."""
    for name, quoted, normal in [("fp8_e4m3", 9.2e-8, 2.0**-6), ("fp8_e5m2", 3.0e-10, 2.0**-14)]:
        assert round_float(quoted, name) == 0
        assert float_format(name).smallest_normal == normal == 2.0 ** (1 - float_format(name).bias)


@pytest.mark.equation("bf16", "fp16")
def test_bfloat16_keeps_the_range_that_float16_loses():
    """Erratum 49: what bfloat16 avoids is the overflow and underflow of fp16."""
    assert np.isinf(round_float(1e5, "fp16")) and round_float(1e5, "bf16") == 99840
    assert round_float(1e-8, "fp16") == 0 and round_float(1e-8, "bf16") == pytest.approx(1.0012e-8, rel=1e-4)


@pytest.mark.equation("float-format", "fp8-e4m3")
def test_not_every_number_is_a_one_and_a_mantissa():
    """Erratum 51: with the top exponent kept for infinities E4M3 would end at 240; with one NaN it ends at 448."""
    like_ieee = (2 - 2.0**-3) * 2.0 ** (14 - 7)
    assert (like_ieee, float_format("fp8_e4m3").largest) == (240, 448)
    values = decode_float(patterns("fp8_e4m3"), "fp8_e4m3")
    assert np.isnan(values).sum() == 2 and not np.isinf(values).any()
    assert values[0] == 0 and values[1] == 2.0**-9  # 1.m would give 2^-7 and more


@pytest.mark.equation("ulp", "wn-fp8-ulp")
def test_spacing():
    assert (ulp(1.0, "fp8_e4m3"), ulp(1.0, "fp8_e5m2")) == (0.125, 0.25)
    for name in SHORT:
        values = decode_float(patterns(name)[: FORMATS[name].largest_code + 1], name).astype(np.float64)
        np.testing.assert_array_equal(np.diff(values), ulp(values[:-1], name))
    np.testing.assert_array_equal(ulp([1.0, 1.5, 2.0, 0.0], "fp32"), [2.0**-23, 2.0**-23, 2.0**-22, 2.0**-149])


@ALL
@pytest.mark.equation("rounding-modes", "float-format")
def test_rounding_is_monotone_odd_idempotent_and_to_within_half_an_ulp(name):
    rng = np.random.default_rng(0)
    x = np.sort(np.concatenate([rng.uniform(-400, 400, 500), rng.normal(size=500) * 10.0 ** rng.uniform(-12, 0, 500)]))
    rounded = round_float(x, name)
    assert (np.diff(rounded.astype(np.float64)) >= 0).all()
    np.testing.assert_array_equal(round_float(-x, name), -rounded)
    np.testing.assert_array_equal(round_float(rounded, name), rounded)
    for number, nearest, step in zip(x, rounded, ulp(x, name), strict=True):  # in fractions: exact
        assert abs(Fraction(float(nearest)) - Fraction(number)) <= Fraction(step) / 2
    assert (np.abs(round_float(x, name, rounding="down")) <= np.abs(x)).all()


@pytest.mark.parametrize("name", [*SHORT, "tf32"])
@pytest.mark.equation("rounding-modes")
def test_stochastic_rounding_has_the_right_mean_and_only_the_two_neighbours(name):
    step = float(ulp(1.0, name))
    x = np.full(40_000, 1 + 0.3 * step)
    rounded = round_float(x, name, rounding="stochastic", rng=np.random.default_rng(0)).astype(np.float64)
    assert set(np.unique(rounded)) == {1.0, 1 + step}
    assert (rounded.mean() - 1) / step == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / len(x)))
    exact = np.array([0.0, -0.0, 1.0, -1.5, 2.0**-6])
    same(round_float(exact, name, rounding="stochastic", rng=np.random.default_rng(1)), exact.astype(np.float32))


@pytest.mark.equation("fp8-e4m3", "fp8-e5m2", "fp16")
def test_what_lies_beyond_the_largest():
    for name, largest, beyond in [("fp8_e4m3", 448, np.nan), ("fp8_e5m2", 57344, np.inf), ("fp16", 65504, np.inf)]:
        huge = np.array([1e30, np.inf, -1e30])
        np.testing.assert_array_equal(round_float(huge, name), [beyond, beyond, -beyond])
        np.testing.assert_array_equal(round_float(huge, name, saturate=True), [largest, largest, -largest])
        np.testing.assert_array_equal(round_float(huge, name, rounding="down"), [largest, beyond, -largest])
        assert np.isnan(round_float(np.nan, name, saturate=True))
    np.testing.assert_array_equal(round_float([464.0, 464.1], "fp8_e4m3"), [448, np.nan])  # the tie is still 448


@ALL
def test_shapes_and_widths(name):
    for shape in [(), (0,), (2, 0), (2, 3)]:
        codes = encode_float(np.ones(shape, np.float32), name)
        assert codes.shape == shape and codes.dtype == FORMATS[name].storage
        assert decode_float(codes, name).shape == shape and decode_float(codes, name).dtype == np.float32


def test_bad_input_is_refused():
    for call in (float_format, lambda n: encode_float(1.0, n), lambda n: decode_float(np.zeros(1, np.uint8), n)):
        with pytest.raises(ValueError, match=r"float_format: the format must be one of 'fp32', .*got fp4"):
            call("fp4")
    with pytest.raises(ValueError, match=r"encode_float: rounding must be one of"):
        encode_float(1.0, "bf16", rounding="up")
    with pytest.raises(ValueError, match=r"encode_float: x must be floating-point numbers"):
        encode_float(np.arange(3), "bf16")
    with pytest.raises(ValueError, match=r"encode_float: rng must be a generator"):
        round_float(1.0, "bf16", rounding="stochastic")
    with pytest.raises(ValueError, match=r"decode_float: codes must be an array of uint16 for bf16"):
        decode_float(np.zeros(1, np.uint8), "bf16")
    with pytest.raises(ValueError, match=r"decode_float: codes must be of 19 bits"):
        decode_float(np.array([2**19], np.uint32), "tf32")
    for x in (449.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"ulp: x must be finite and at most 448 in fp8_e4m3"):
            ulp(x, "fp8_e4m3")
