r"""How far a kernel may be from the truth: a rule computed for each problem, never a number found by trial.

The truth is the reference in float64. A kernel computes in float32 and rounds its results to its dtype, so it
is allowed, for each row of a result (for weights' gradients, for the whole of it),

$$2\max\{\mathrm{err}(\text{low}),\ \mathrm{err}(\text{low at inputs moved by one ulp})\}
  + 2\max\{u_{\rm out}\max|\text{truth}|,\ u_{32}\,a\sqrt K\}$$

where *low* is the same reference run in float32 and rounded to the dtype, the moves are random and few,
$u$ is the spacing of floats at 1, $a$ the largest summand and $K$ the number of summands. The first part knows
how well conditioned the problem is (a constant row under LayerNorm is not); the second covers another order of
summation. In addition the root mean square of the error of the whole result is bounded, twice that of *low* plus a
few 10^-6 of the result's own, which catches a drift that no single entry shows. `tests/kernels/test_tolerance.py` holds that honest variants pass and bugs do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.evaluate import evaluate

SPACING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
RELATIVE_RMS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}
MOVES = 3


@dataclass(frozen=True)
class Scale:
    """The largest summand behind each row of a result (or one number), how many are summed, and the unit of judgement.

    ``by_row`` judges every row by its own errors; otherwise the whole array is one unit (weights' gradients,
    whose single entries are too few to know their own conditioning).
    """

    summand: Any
    count: int
    by_row: bool = True


@dataclass(frozen=True)
class Expectation:
    """The truth about one result and how far from it is allowed."""

    name: str
    truth: np.ndarray
    allowed: np.ndarray  # (..., 1) by row, or 0-d
    allowed_rms: float


@dataclass(frozen=True)
class Verdict:
    """The worst of one comparison: passed when measured <= allowed."""

    name: str
    measured: float
    allowed: float

    @property
    def ratio(self) -> float:
        """measured / allowed, with 0 / 0 = 0; infinite for NaN."""
        if self.measured == 0:
            return 0.0
        return self.measured / self.allowed if self.allowed > 0 and np.isfinite(self.measured) else np.inf

    @property
    def passed(self) -> bool:
        """Whether the bound holds."""
        return self.ratio <= 1.0


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest values of ``dtype``, as float64."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float64)
    single = np.ascontiguousarray(array, dtype=np.float32)
    if dtype == "bfloat16":  # ties to even, on the bits: the upper half of a float32
        bits = single.view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        single = np.where(np.isfinite(single), bits.view(np.float32), single)
    return single.astype(np.float64)


def moved(array: np.ndarray, dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Every entry moved up or down by one unit in its last place, at random."""
    spacing = SPACING[dtype] * 2.0 ** np.floor(np.log2(np.where(array == 0, 1.0, np.abs(array))))
    return array + np.where(array == 0, 0.0, spacing) * rng.choice([-1.0, 1.0], size=array.shape)


def expect(
    function: Callable,
    inputs: Sequence[np.ndarray],
    cotangents: Sequence[np.ndarray | None],
    dtype: str,
    names: Sequence[str],
    scales: Sequence[Scale],
    cast: Callable[[list[np.ndarray]], list[np.ndarray]] | None = None,
    constants: Sequence[np.ndarray | None] = (),
    dtypes: Sequence[str] | None = None,
    **parameters: Any,
) -> list[Expectation]:
    """The truth and the allowance for every output and gradient of ``function``, in this order.

    ``cast`` changes the inputs of the low runs where the contract rounds an intermediate result to the
    kernel's dtype, so that they lose what the kernel has to lose. ``dtypes`` gives the dtype of every result where
    not all have ``dtype``; a result of integers or truth values must be equal.
    """
    cast = cast or (lambda arrays: arrays)

    def run(precision: Any, arrays: Sequence[np.ndarray], seeds: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        with np.errstate(all="ignore"):
            values, gradients = evaluate(function, arrays, seeds, precision, constants, **parameters)
        return [*values, *gradients]

    truth = run(np.float64, inputs, cotangents)
    rng = np.random.default_rng(0)
    lows = [run(np.float32, cast(list(inputs)), cotangents)]
    for _ in range(MOVES):
        nearby = cast([moved(a, "float32", rng) for a in inputs])
        lows.append(run(np.float32, nearby, [None if c is None else moved(c, "float32", rng) for c in cotangents]))

    expectations = []
    for index, (name, exact, scale) in enumerate(zip(names, truth, scales, strict=True)):
        if exact.dtype.kind != "f":
            expectations.append(Expectation(name, exact.astype(np.float64), np.zeros(()), 0.0))
            continue
        own = dtypes[index] if dtypes else dtype
        errors = [_distance(rounded(low[index], own), exact) for low in lows]
        size = np.where(np.isfinite(exact), np.abs(exact), 0.0)
        unit = (
            (lambda a, by_row=scale.by_row: a.max(-1, keepdims=True) if by_row else a.max()) if exact.size else np.sum
        )
        worst = np.max([unit(error) for error in errors], axis=0)
        order = SPACING["float32"] * np.asarray(scale.summand) * np.sqrt(scale.count)  # another order of summation
        allowed = 2 * (worst + np.maximum(SPACING[own] * unit(size), order) + SMALLEST[own])
        relative = RELATIVE_RMS[own] * (np.sqrt(max(scale.count, 1)) if own == "float32" else 1.0)
        rms = 2 * (max(_rms(error) for error in errors) + _rms(order) + SMALLEST[own]) + relative * _rms(size)
        expectations.append(Expectation(name, exact, allowed, rms))
    return expectations


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


def judge(actual: np.ndarray, expected: Expectation) -> Verdict:
    """The worst entry of a result against its allowance, or its root mean square if that is worse."""
    if actual.shape != expected.truth.shape:
        return Verdict(expected.name, np.inf, 0.0)
    if actual.size == 0:
        return Verdict(expected.name, 0.0, 0.0)
    error = _distance(actual, expected.truth)
    share = _share(error, np.broadcast_to(expected.allowed, error.shape))
    worst = np.unravel_index(int(np.argmax(share)), share.shape)
    entry = Verdict(expected.name, float(error[worst]), float(np.broadcast_to(expected.allowed, error.shape)[worst]))
    spread = Verdict(expected.name + " (rms)", _rms(error), expected.allowed_rms)
    return max(entry, spread, key=lambda verdict: verdict.ratio)


def error_map(actual: np.ndarray, expected: Expectation) -> np.ndarray:
    """|error| / allowed for every entry: 1 is the limit."""
    error = _distance(actual, expected.truth)
    return _share(error, np.broadcast_to(expected.allowed, error.shape))


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|, 0 where both are the same infinity or both NaN, infinite where one of them is NaN."""
    with np.errstate(invalid="ignore"):
        error = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


def _share(error: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, np.where(allowed > 0, error / allowed, np.inf))
