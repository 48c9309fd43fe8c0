r"""Floating-point formats bit by bit: fp32, fp16, bfloat16, TF32, FP8 E4M3 and E5M2.

The magnitudes of a format, in order, have consecutive codes: from 0 over the subnormals and the normals to the
largest. So encoding is counting. With e the exponent of the number (never below that of the smallest normal) and m
the bits of the mantissa, the number is r steps of 2^(e - m), and its code is r plus 2^m for every exponent below e; a
mantissa that rounds up into the next exponent needs no case of its own.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.checks import message, require, require_one_of

ROUNDINGS = ("nearest", "stochastic", "down")


class FloatFormat(NamedTuple):
    r"""A format by its widths: sign, exponent, mantissa.

    Equation: `float-format` $(-1)^s(1.m)2^{e-\mathrm{bias}}$ normal, $(-1)^s(0.m)2^{1-\mathrm{bias}}$ subnormal
    Source: notes §7.
    Differs: zero, subnormals, infinities and NaN are no $1.m$; E4M3 has no infinities and one NaN (erratum 51).
    """

    name: str
    exponent: int
    mantissa: int
    storage: type[np.unsignedinteger]
    infinities: bool = True  # without: the top exponent holds numbers, and only the code of all ones is NaN

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def lowest_exponent(self) -> int:
        """Exponent of the smallest normal number, and of the subnormals."""
        return 1 - self.bias

    @property
    def largest_code(self) -> int:
        """Code of the largest finite number."""
        all_ones = 2 ** (self.exponent + self.mantissa) - 1
        return all_ones - 2**self.mantissa if self.infinities else all_ones - 1

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.lowest_exponent

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (self.lowest_exponent - self.mantissa)

    @property
    def largest(self) -> float:
        return float(_magnitudes(np.array([self.largest_code]), self)[0])

    @property
    def ulp_at_one(self) -> float:
        return 2.0**-self.mantissa


FORMATS = {
    f.name: f
    for f in (
        FloatFormat("fp32", 8, 23, np.uint32),
        FloatFormat("fp16", 5, 10, np.uint16),
        FloatFormat("bf16", 8, 7, np.uint16),
        FloatFormat("tf32", 8, 10, np.uint32),
        FloatFormat("fp8_e4m3", 4, 3, np.uint8, infinities=False),
        FloatFormat("fp8_e5m2", 5, 2, np.uint8),
    )
}


def float_format(name: str) -> FloatFormat:
    r"""A format by its name.

    Equation: `float-format-table` bits, exponent and mantissa, smallest normal, largest finite, ulp at 1
    Equation: `fp32` 8/23, largest $3.4028\cdot10^{38}$
    Equation: `fp16` 5/10, largest 65504
    Equation: `bf16` 8/7, largest $3.3895\cdot10^{38}$
    Equation: `tf32` 8/10, 19 bits that carry information
    Equation: `fp8-e4m3` 4/3, largest 448
    Equation: `fp8-e5m2` 5/2, largest 57344
    Raises: ValueError for an unknown name.
    Source: notes §7 Tables 3 and 4.
    Differs: the FP8 formats end at 2^-6 and 2^-14 at the lower end, subnormals at 2^-9 and 2^-16 (erratum 47).
    """
    require_one_of(name, FORMATS, "float_format", "the format")
    return FORMATS[name]


def _magnitudes(codes: np.ndarray, f: FloatFormat) -> np.ndarray:
    """The finite numbers that codes without sign stand for, in float64."""
    codes = codes.astype(np.int64)
    exponent, mantissa = codes >> f.mantissa, codes & (2**f.mantissa - 1)
    hidden = np.where(exponent > 0, 2**f.mantissa, 0)
    return np.ldexp((hidden + mantissa).astype(np.float64), np.maximum(exponent, 1) - f.bias - f.mantissa)


def encode_float(
    x: Any, name: str, *, rounding: str = "nearest", saturate: bool = False, rng: np.random.Generator | None = None
) -> np.ndarray:
    r"""The codes of numbers in a format, rounded once.

    Equation: `float-format` $(-1)^s(1.m)2^{e-\mathrm{bias}}$, $(-1)^s(0.m)2^{1-\mathrm{bias}}$
    Equation: `rounding-modes` nearest with ties to even; stochastic, $\mathbb E[\mathrm{sr}(x)]=x$; down, towards zero
    Equation: `bf16` rounding to nearest even from fp32
    Equation: `fp16` as NumPy's float16
    Equation: `fp8-e4m3` past 448: NaN, or 448 when saturating
    Equation: `fp8-e5m2` past 57344: infinity, or 57344 when saturating
    Shapes: x (*S) floats -> (*S) unsigned integers, 8, 16 or 32 bits wide
    Raises: ValueError for an unknown format or rounding, numbers that are not floats, or stochastic without rng.
    Source: notes §7.
    """
    f = float_format(name)
    require_one_of(rounding, ROUNDINGS, "encode_float", "rounding")
    x = np.asarray(x)
    require(x.dtype.kind == "f" and x.dtype.itemsize <= 8, "encode_float", "x", "floating-point numbers", x)
    if rounding == "stochastic" and rng is None:
        raise ValueError(message("encode_float", "rng", "a generator for stochastic rounding", None))

    finite = np.isfinite(x)
    magnitude = np.where(finite, np.abs(x.astype(np.float64)), 0.0)
    exponent = np.frexp(magnitude)[1].astype(np.int64) - 1
    exponent = np.where(magnitude > 0, np.maximum(exponent, f.lowest_exponent), f.lowest_exponent)
    steps = np.ldexp(magnitude, f.mantissa - exponent)  # exact: a power of two
    r = np.rint(steps) if rounding == "nearest" else np.floor(steps)
    if rng is not None and rounding == "stochastic":
        r = r + (rng.random(x.shape) < steps - r)
    code = r.astype(np.int64) + ((exponent - f.lowest_exponent) << f.mantissa)

    nan = 2 ** (f.exponent + f.mantissa) - 1
    beyond = f.largest_code
    if not saturate and rounding == "down":
        beyond = np.where(finite, f.largest_code, f.largest_code + 1)  # only an infinity stays one
    elif not saturate:
        beyond = f.largest_code + 1  # infinity, or the NaN of a format that has none
    code = np.where(finite & (code <= f.largest_code), code, beyond)
    quiet = nan if not f.infinities else f.largest_code + 1 + 2 ** (f.mantissa - 1)
    code = np.where(np.isnan(x), quiet, code)
    return np.asarray(code + (np.signbit(x).astype(np.int64) << (f.bits - 1)), f.storage)


def _decode(codes: np.ndarray, f: FloatFormat) -> np.ndarray:
    unsigned = codes & (2 ** (f.bits - 1) - 1)
    magnitude = _magnitudes(np.minimum(unsigned, f.largest_code), f).astype(np.float32)
    magnitude = np.where(unsigned > f.largest_code, np.float32(np.nan), magnitude)
    if f.infinities:
        magnitude = np.where(unsigned == f.largest_code + 1, np.float32(np.inf), magnitude)
    return np.asarray(np.where(codes >> (f.bits - 1) & 1, -magnitude, magnitude), np.float32)


@functools.cache
def _all_values(f: FloatFormat) -> np.ndarray:
    values = _decode(np.arange(2**f.bits), f)
    values.flags.writeable = False
    return values


def decode_float(codes: np.ndarray, name: str) -> Float[np.ndarray, "*S"]:
    r"""The numbers that codes stand for, exactly: each of these formats fits into float32.

    Equation: `float-format` $(-1)^s(1.m)2^{e-\mathrm{bias}}$ normal, $(-1)^s(0.m)2^{1-\mathrm{bias}}$ subnormal
    Equation: `fp32` the numbers themselves
    Equation: `tf32` 19 bits: 1 + 8 + 10
    Equation: `fp8-e4m3` exponent 15 holds numbers, its last mantissa NaN
    Equation: `fp8-e5m2` exponent 31 holds infinities and NaN
    Shapes: codes (*S) unsigned integers -> (*S) float32
    Raises: ValueError for an unknown format or codes of another width.
    Source: notes §7.
    """
    f = float_format(name)
    sound = isinstance(codes, np.ndarray) and codes.dtype == f.storage
    require(sound, "decode_float", "codes", f"an array of {f.storage.__name__} for {name}", codes)
    if f.bits <= 16:
        return np.asarray(_all_values(f)[codes])
    if f.bits < 32:
        require(not (codes >> f.bits).any(), "decode_float", "codes", f"of {f.bits} bits", "one with more")
    if f.bits == 32:
        return codes.view(np.float32).copy()
    return _decode(codes.astype(np.int64).reshape(-1), f).reshape(codes.shape)


def round_float(
    x: Any, name: str, *, rounding: str = "nearest", saturate: bool = False, rng: np.random.Generator | None = None
) -> Float[np.ndarray, "*S"]:
    r"""Numbers as a format holds them, in float32: encoded and decoded.

    Equation: `rounding-modes` nearest-even, or stochastic with $\mathbb E[\mathrm{sr}(x)]=x$
    Equation: `tf32` the rounding of the inputs of a product, on request only (erratum 50)
    Shapes: x (*S) -> (*S) float32
    Raises: ValueError as `encode_float` does.
    Source: notes §7.
    """
    return decode_float(encode_float(x, name, rounding=rounding, saturate=saturate, rng=rng), name)


def ulp(x: Any, name: str) -> np.ndarray:
    r"""Distance of neighbouring numbers of a format at x.

    Equation: `ulp` $\mathrm{ulp}(x)=2^{\lfloor\log_2\lvert x\rvert\rfloor-m}$, that of the subnormals below the normals
    Shapes: x (*S) -> (*S) float64
    Raises: ValueError for an unknown format or a number beyond its largest.
    Source: notes §7 footnote 4.
    """
    f = float_format(name)
    magnitude = np.abs(np.asarray(x, np.float64))
    within = bool((magnitude <= f.largest).all())
    require(within, "ulp", "x", f"finite and at most {f.largest:.6g} in {name}", "NaN or a number beyond")
    exponent = np.where(magnitude > 0, np.frexp(magnitude)[1] - 1, f.lowest_exponent)
    return np.asarray(np.ldexp(1.0, np.maximum(exponent, f.lowest_exponent) - f.mantissa))
