r"""Integers in place of numbers: symmetric int8 and int4, a zero point, scales for a tensor, a channel or a block.

`axis` says along which axes numbers *share* a scale: None is one scale for the tensor, -1 one for each row of a
matrix (d_out, d_in), which is each output channel.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8, UInt8

from minillm.checks import require, require_one_of, require_positive

Axes = int | tuple[int, ...] | None
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # a scale of 0 could not be divided by


class Quantised(NamedTuple):
    """Signed codes and the scales they are multiplied with, of a shape that broadcasts against them."""

    codes: np.ndarray  # int8
    scale: np.ndarray  # float32


class QuantisedAsymmetric(NamedTuple):
    """Unsigned codes, scales, and the codes that mean zero."""

    codes: np.ndarray  # uint8
    scale: np.ndarray  # float32
    zero: np.ndarray  # int32


def _numbers(where: str, x: np.ndarray) -> np.ndarray:
    require(isinstance(x, np.ndarray) and x.dtype.kind == "f", where, "x", "an array of floating-point numbers", x)
    require(x.size > 0, where, "x", "an array with at least one number", x)
    require(bool(np.isfinite(x).all()), where, "x", "finite", "NaN or infinity among its numbers")
    return x.astype(np.float32, copy=False)


def _check_axis(where: str, x: np.ndarray, axis: Axes) -> None:
    axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    sound = all(isinstance(a, int | np.integer) and -x.ndim <= a < x.ndim for a in axes)
    sound = sound and len({a % max(x.ndim, 1) for a in axes}) == len(axes)
    require(sound, where, "axis", f"None or different axes of an array with {x.ndim}", axis)


def _symmetric(where: str, x: np.ndarray, axis: Axes, largest: int) -> Quantised:
    x = _numbers(where, x)
    _check_axis(where, x, axis)
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(largest)
    scale = np.maximum(scale, np.float32(SMALLEST_SCALE))
    return Quantised(np.clip(np.rint(x / scale), -largest, largest).astype(np.int8), scale)


def quantise_int8(x: Float[np.ndarray, "*S"], axis: Axes = None) -> Quantised:
    r"""Symmetric int8: the largest magnitude becomes 127, and -128 is not used.

    Equation: `int8-quant` $q=\mathrm{clip}(\mathrm{round}(x/s),-127,127),\ s=\max\lvert x\rvert/127$
    Equation: `scale-granularity` one scale per tensor (axis None), per row (-1), per block (of a reshaped array)
    Shapes: x (*S) -> codes (*S) int8 and scale, 1 along the shared axes
    Raises: ValueError for numbers that are not finite, no numbers, or an axis that x does not have.
    Source: notes §7 Table 4.
    Differs: the step of an integer format is the scale (erratum 48).
    """
    return _symmetric("quantise_int8", x, axis, 127)


def quantise_int4(x: Float[np.ndarray, "*S"], axis: Axes = None) -> Quantised:
    r"""Symmetric int4: fifteen levels from -7 to 7, each still in a byte of its own (see `pack_int4`).

    Equation: `int4-quant` $q=\mathrm{clip}(\mathrm{round}(x/s),-7,7),\ s=\max\lvert x\rvert/7$
    Equation: `scale-granularity` one scale per tensor (axis None), per row (-1), per block (of a reshaped array)
    Shapes: x (*S) -> codes (*S) int8 and scale, 1 along the shared axes
    Raises: ValueError for numbers that are not finite, no numbers, or an axis that x does not have.
    Source: notes §7 Table 4.
    Differs: the levels are one step apart, not 1/16 (erratum 48).
    """
    return _symmetric("quantise_int4", x, axis, 7)


def dequantise(quantised: Quantised) -> Float[np.ndarray, "*S"]:
    r"""Codes times scales.

    Equation: `int8-quant` $\hat x=sq$
    Equation: `int4-quant` $\hat x=sq$
    Shapes: codes (*S), scale broadcastable -> (*S) float32
    Raises: ValueError if the scales do not broadcast against the codes.
    Source: notes §7.
    """
    codes, scale = quantised
    fits = scale.ndim == codes.ndim and all(s in (1, n) for s, n in zip(scale.shape, codes.shape))
    require(fits, "dequantise", "the scales", f"broadcastable against codes of shape {codes.shape}", scale)
    return codes.astype(np.float32) * scale


def pack_int4(codes: Int8[np.ndarray, "*B n"]) -> UInt8[np.ndarray, "*B m"]:
    r"""Two signed codes to a byte: the even one in the low half, the odd one in the high half.

    Equation: `int4-quant` two codes in $-8..7$ to a byte, in two's complement
    Shapes: codes (..., n) int8 -> (..., ceil(n / 2)) uint8; an odd row ends with a zero
    Raises: ValueError for codes that are not int8 from -8 to 7.
    Source: notes §7.
    """
    sound = isinstance(codes, np.ndarray) and codes.dtype == np.int8 and codes.ndim >= 1
    require(sound, "pack_int4", "codes", "an int8 array with at least one axis", codes)
    require(bool(((codes >= -8) & (codes <= 7)).all()), "pack_int4", "codes", "from -8 to 7", "some outside")
    even, odd = codes[..., ::2], codes[..., 1::2]
    packed = even.view(np.uint8) & 15
    packed[..., : odd.shape[-1]] |= (odd.view(np.uint8) & 15) << 4
    return packed


def unpack_int4(packed: UInt8[np.ndarray, "*B m"], n: int) -> Int8[np.ndarray, "*B n"]:
    r"""The n codes of each row of packed bytes.

    Equation: `int4-quant` the inverse of the packing
    Shapes: packed (..., ceil(n / 2)) uint8 -> (..., n) int8
    Raises: ValueError unless packed is uint8 with a row of that many bytes.
    Source: notes §7.
    """
    require_positive(n, "unpack_int4", "n", integer=True, zero_ok=True)
    sound = isinstance(packed, np.ndarray) and packed.dtype == np.uint8 and packed.ndim >= 1
    sound = sound and packed.shape[-1] == -(-n // 2)
    require(sound, "unpack_int4", "packed", f"a uint8 array with {-(-n // 2)} bytes to a row", packed)
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    # Shifting a signed byte to the right copies its sign, which turns four bits into a signed number.
    codes[..., ::2] = (packed << 4).view(np.int8) >> 4
    codes[..., 1::2] = packed.view(np.int8) >> 4
    return codes[..., :n]


def quantise_asymmetric(x: Float[np.ndarray, "*S"], bits: int = 8, axis: Axes = None) -> QuantisedAsymmetric:
    r"""Unsigned codes over the whole range of x, with a code that means exactly zero.

    Equation: `quant-asymmetric` $q=\mathrm{clip}(\mathrm{round}(x/s)+z,0,2^b-1),\ s=\frac{\max x-\min x}{2^b-1},\ z=\mathrm{round}(-\min x/s)$
    Shapes: x (*S) -> codes (*S) uint8, scale and zero, 1 along the shared axes
    Raises: ValueError for bits outside 2 to 8, numbers that are not finite, no numbers, or an axis that x does not have.
    Source: notes §7; the usual affine quantisation.
    Differs: the range is widened to contain 0, so that 0 (padding, ReLU) is exact.
    """
    where = "quantise_asymmetric"
    require_one_of(bits, range(2, 9), where, "bits")
    x = _numbers(where, x)
    _check_axis(where, x, axis)
    top = 2**bits - 1
    low = np.minimum(x.min(axis=axis, keepdims=True), np.float32(0)).astype(np.float64)  # max - min may pass float32
    high = np.maximum(x.max(axis=axis, keepdims=True), np.float32(0)).astype(np.float64)
    scale = np.maximum(((high - low) / top).astype(np.float32), np.float32(SMALLEST_SCALE))
    zero = np.clip(np.rint(-low / scale), 0, top).astype(np.int32)
    codes = np.clip(np.rint(x / scale) + zero, 0, top).astype(np.uint8)
    return QuantisedAsymmetric(codes, scale, zero)


def dequantise_asymmetric(quantised: QuantisedAsymmetric) -> Float[np.ndarray, "*S"]:
    r"""Distance from the code of zero, times the scale.

    Equation: `quant-asymmetric` $\hat x=s(q-z)$
    Shapes: codes (*S), scale and zero broadcastable -> (*S) float32
    Raises: ValueError if scales or zeros do not broadcast against the codes.
    Source: notes §7.
    """
    codes, scale, zero = quantised
    fits = all(
        part.ndim == codes.ndim and all(s in (1, n) for s, n in zip(part.shape, codes.shape)) for part in (scale, zero)
    )
    wanted = f"broadcastable against codes of shape {codes.shape}"
    require(fits, "dequantise_asymmetric", "scales and zeros", wanted, f"{scale.shape} and {zero.shape}")
    return scale * (codes.astype(np.int32) - zero).astype(np.float32)
