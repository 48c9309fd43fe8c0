r"""Products in FP8: scale, cast, multiply with sums in float32, scale back."""

from collections import deque
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minillm.checks import require, require_one_of, require_positive
from minillm.data.float_formats import decode_float, encode_float, float_format

FP8 = ("fp8_e4m3", "fp8_e5m2")
DIRECTIONS = {"forward": "fp8_e4m3", "backward": "fp8_e5m2"}


class ScaledFP8(NamedTuple):
    """Codes in a format of eight bits, and the scales S that the numbers were multiplied with before the cast."""

    codes: np.ndarray  # uint8
    scale: np.ndarray  # float32, broadcastable
    name: str


def fp8_scale(x: Float[np.ndarray, "*S"], name: str = "fp8_e4m3", axis: int | None = None) -> np.ndarray:
    r"""The factor that takes the largest magnitude to the largest number of the format.

    Equation: `fp8-scaling` $S=\frac{\mathrm{max}_{\rm fp8}}{\max\lvert x\rvert}$
    Equation: `scale-granularity` one factor (axis None), or one for each row of (d_out, d_in) (axis -1)
    Shapes: x (*S) -> float32 that broadcasts against x
    Raises: ValueError for another format, no numbers, numbers that are not finite, or an axis that x does not have.
    Source: notes §7.
    """
    require_one_of(name, FP8, "fp8_scale", "the format")
    require(x.dtype.kind == "f" and x.size > 0, "fp8_scale", "x", "floating-point numbers, at least one", x)
    require(bool(np.isfinite(x).all()), "fp8_scale", "x", "finite", "NaN or infinity among its numbers")
    require(axis is None or -x.ndim <= axis < x.ndim, "fp8_scale", "axis", f"None or an axis of {x.ndim}", axis)
    amax = np.abs(x).max(axis=axis, keepdims=True).astype(np.float64)
    # The factor is a float32 too: what is so small that it would pass its range keeps the largest factor.
    smallest = float_format(name).largest / float(np.finfo(np.float32).max)
    factor = float_format(name).largest / np.maximum(amax, smallest)
    return np.where(amax > 0, factor, 1.0).astype(np.float32)


def cast_fp8(
    x: Float[np.ndarray, "*S"], name: str = "fp8_e4m3", axis: int | None = None, scale: np.ndarray | None = None
) -> ScaledFP8:
    r"""Scale and cast; what a given scale (a delayed one) takes beyond the format saturates.

    Equation: `fp8-scaling` $x_{\rm scaled}=xS$
    Shapes: x (*S) -> codes (*S) uint8 and scale
    Raises: ValueError as `fp8_scale`, or for a scale that is not positive and finite or does not broadcast.
    Source: notes §7.
    """
    own = fp8_scale(x, name, axis)
    if scale is None:
        scale = own
    scale = np.asarray(scale, np.float32).reshape((1,) * (x.ndim - np.ndim(scale)) + np.shape(scale))
    fits = scale.ndim == x.ndim and all(s in (1, n) for s, n in zip(scale.shape, x.shape))
    require(fits, "cast_fp8", "scale", f"broadcastable against {x.shape}", scale)
    sound = bool((np.isfinite(scale) & (scale > 0)).all())
    require(sound, "cast_fp8", "scale", "positive and finite", "one that is not")
    return ScaledFP8(encode_float(x.astype(np.float64) * scale, name, saturate=True), scale, name)


def uncast_fp8(cast: ScaledFP8) -> Float[np.ndarray, "*S"]:
    r"""The numbers back, in float32.

    Equation: `fp8-scaling` $y=y_{\rm scaled}S^{-1}$
    Shapes: codes (*S) -> (*S)
    Raises: ValueError for codes that are not bytes.
    Source: notes §7.
    """
    return (decode_float(cast.codes, cast.name).astype(np.float64) / cast.scale).astype(np.float32)


def _check_product(where: str, w: np.ndarray, x: np.ndarray) -> None:
    fits = w.ndim == x.ndim == 2 and w.shape[1] == x.shape[0]
    require(fits, where, "the inputs", "matrices (d_out, d_in) and (d_in, n)", f"{w.shape} and {x.shape}")


def multiply_fp8(w: ScaledFP8, x: ScaledFP8) -> Float[np.ndarray, "d_out n"]:
    r"""The product of two cast matrices: sums in float32, then the scales taken out.

    Equation: `fp8-gemm` $\mathbf O=\mathbf O_{\rm scaled}\cdot\frac1{S_XS_W}$, row i by $S_XS_{W,i}$
    Shapes: w (d_out, d_in), x (d_in, n) -> (d_out, n)
    Raises: ValueError if the matrices do not fit, or a scale varies along the axis that is summed over.
    Source: notes §7.
    """
    _check_product("multiply_fp8", w.codes, x.codes)
    constant = w.scale.shape[1] == 1 and x.scale.shape[0] == 1
    require(constant, "multiply_fp8", "the scales", "constant along d_in", f"{w.scale.shape} and {x.scale.shape}")
    scaled = decode_float(w.codes, w.name) @ decode_float(x.codes, x.name)
    return (scaled / (w.scale.astype(np.float64) * x.scale)).astype(np.float32)


def fp8_gemm(
    w: Float[np.ndarray, "d_out d_in"], x: Float[np.ndarray, "d_in n"], *, per_channel: bool = False
) -> Float[np.ndarray, "d_out n"]:
    r"""W X with both cast to E4M3.

    Equation: `fp8-gemm` $\mathbf O=\mathbf O_{\rm scaled}\cdot\frac1{S_XS_W}$
    Equation: `scale-granularity` a scale for each row of W with per_channel
    Shapes: w (d_out, d_in), x (d_in, n) -> (d_out, n)
    Raises: ValueError if the matrices do not fit or hold numbers that are not finite.
    Source: notes §7.
    """
    _check_product("fp8_gemm", w, x)
    return multiply_fp8(cast_fp8(w, axis=-1 if per_channel else None), cast_fp8(x))


def _cast_bound(x: np.ndarray, name: str, axis: int | None) -> np.ndarray:
    """Half a unit in the last place of every number: relative for normals, absolute below them."""
    f = float_format(name)
    return np.maximum(np.abs(x) * 2.0 ** -(f.mantissa + 1), f.smallest_subnormal / 2 / fp8_scale(x, name, axis))


def fp8_gemm_bound(
    w: Float[np.ndarray, "d_out d_in"], x: Float[np.ndarray, "d_in n"], *, per_channel: bool = False
) -> Float[np.ndarray, "d_out n"]:
    r"""How far `fp8_gemm` can be from the exact product, element by element.

    Equation: `fp8-gemm` $\lvert\hat{\mathbf O}-\mathbf O\rvert\le\lvert\mathbf W\rvert\delta_X+\delta_W\lvert\mathbf X\rvert+\delta_W\delta_X+$ the rounding of the sums
    Equation: `fp8-scaling` $\delta\le2^{-m-1}\lvert x\rvert$ for normals, half the step of the subnormals over S below
    Shapes: w (d_out, d_in), x (d_in, n) -> (d_out, n) float64
    Raises: ValueError as `fp8_gemm` does.
    Source: notes §7.
    """
    _check_product("fp8_gemm_bound", w, x)
    w, x = np.abs(w.astype(np.float64)), np.abs(x.astype(np.float64))
    dw, dx = _cast_bound(w, "fp8_e4m3", -1 if per_channel else None), _cast_bound(x, "fp8_e4m3", None)
    sums = (w.shape[1] + 2) * 2.0**-24 * ((w + dw) @ (x + dx))
    return w @ dx + dw @ x + dw @ dx + 1.01 * sums


def fp8_format_of(direction: str) -> str:
    r"""E4M3 forward, E5M2 backward.

    Equation: `fp8-recipe` more mantissa for weights and activations, more exponent for gradients
    Raises: ValueError for another direction.
    Source: notes §7.
    """
    require_one_of(direction, DIRECTIONS, "fp8_format_of", "the direction")
    return DIRECTIONS[direction]


def fp8_gemm_backward(
    w: Float[np.ndarray, "d_out d_in"], x: Float[np.ndarray, "d_in n"], do: Float[np.ndarray, "d_out n"]
) -> tuple[Float[np.ndarray, "d_out d_in"], Float[np.ndarray, "d_in n"]]:
    r"""The gradients of W X: operands in E4M3 as in the forward pass, the incoming gradient in E5M2.

    Equation: `fp8-recipe` $\partial\mathbf W=\partial\mathbf O\,\mathbf X^\top,\ \partial\mathbf X=\mathbf W^\top\partial\mathbf O$
    Shapes: w (d_out, d_in), x (d_in, n), do (d_out, n) -> (d_out, d_in), (d_in, n)
    Raises: ValueError if the matrices do not fit.
    Source: notes §7.
    """
    _check_product("fp8_gemm_backward", w, x)
    fits = do.shape == (w.shape[0], x.shape[1])
    require(fits, "fp8_gemm_backward", "the gradient", f"of shape {(w.shape[0], x.shape[1])}", do)
    forward, incoming = fp8_format_of("forward"), cast_fp8(do, fp8_format_of("backward"))
    return multiply_fp8(incoming, cast_fp8(x.T, forward)), multiply_fp8(cast_fp8(w.T, forward), incoming)


class DelayedScale:
    r"""The scale of a tensor from the largest magnitudes that it had in the last few steps.

    Equation: `fp8-recipe` $S=\frac{q_{\max}}{\max_h\mathrm{amax}_{t-h}}$
    Raises: ValueError for another format, or a history or margin that is not positive.
    Source: notes §7; the usual recipe of delayed scaling.
    Differs: margin 1; a larger one leaves room for what grows faster than its history says.
    """

    def __init__(self, name: str = "fp8_e4m3", history: int = 16, margin: float = 1.0):
        require_one_of(name, FP8, "DelayedScale", "the format")
        require_positive(history, "DelayedScale", "history", integer=True)
        require_positive(margin, "DelayedScale", "margin")
        self.name, self.margin = name, float(margin)
        self.amax: deque[float] = deque(maxlen=int(history))

    @property
    def scale(self) -> float:
        """The factor for the next cast; 1 before anything was seen."""
        largest = max(self.amax, default=0.0)
        limit = float(np.finfo(np.float32).max)
        return min(float_format(self.name).largest / (largest * self.margin), limit) if largest > 0 else 1.0

    def cast(self, x: Float[np.ndarray, "*S"]) -> ScaledFP8:
        r"""Cast with the scale of the past, then remember the largest magnitude of x.

        Equation: `fp8-recipe` the scale is known before x is, so that the cast needs no second pass
        """
        cast = cast_fp8(x, self.name, scale=np.full((1,) * x.ndim, self.scale, np.float32))
        self.amax.append(float(np.abs(x).max()))
        return cast
