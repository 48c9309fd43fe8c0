"""How far a float32 result may be from the truth: a rule, never a number found by trial.

The truth is a reference in float64. The yardstick is the same reference run in the working precision, at the
inputs and at inputs moved by one unit in the last place: a correct program may be that wrong, because the
inputs themselves are only known so far. Allowed is twice the worst of these errors, plus two units in the last
place of the result or of the largest summand, whichever is larger, for another order of evaluation. Beside the
largest error the root mean square is held, since a small systematic error hides behind one large entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Evaluation = Callable[..., Sequence[np.ndarray]]
PERTURBATIONS = 6


@dataclass(frozen=True)
class Allowance:
    """The truth of one result, and how far a result in the working precision may be from it."""

    reference: np.ndarray
    largest: float
    rms: float

    def used(self, measured: np.ndarray) -> float:
        """The share of the allowance that a result uses up; above 1 it is wrong, NaN or infinite counts as wrong."""
        assert measured.shape == self.reference.shape, (measured.shape, self.reference.shape)
        wild = ~np.isfinite(self.reference)
        if not np.array_equal(measured[wild], self.reference[wild], equal_nan=True):
            return np.inf
        error = measured.astype(np.float64)[~wild] - self.reference[~wild]
        if not error.size:
            return 0.0
        if not np.all(np.isfinite(error)):
            return np.inf
        shares = [_share(np.abs(error).max(), self.largest)]
        if np.any(self.reference[~wild]):
            shares.append(_share(_rms(error), self.rms))
        return max(shares)


def _share(error: float, allowed: float) -> float:
    return 0.0 if error == 0 else float(error / allowed) if allowed > 0 else np.inf


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def _finite(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)[np.isfinite(x)]


def _difference(low: np.ndarray, reference: np.ndarray) -> np.ndarray:
    both = np.isfinite(low) & np.isfinite(reference)
    return np.asarray(low, dtype=np.float64)[both] - reference[both]


def _moved(inputs: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    """Every floating-point input one unit in the last place up, down or where it was."""
    return [
        np.nextafter(x, x.dtype.type(np.inf) * rng.choice([-1, 1], size=x.shape).astype(x.dtype))
        if isinstance(x, np.ndarray) and x.dtype.kind == "f"
        else x
        for x in inputs
    ]


def allowances(
    evaluate: Evaluation,
    inputs: Sequence[Any],
    *,
    K: int,
    largest_summand: float = 0.0,
    rng: np.random.Generator,
    dtype: Any = np.float32,
) -> list[Allowance]:
    """Apply the rule to every result of ``evaluate(*inputs)``, a reference that computes in its inputs' precision.

    ``inputs`` are given in the working precision ``dtype``, so that the truth is of the very numbers that the
    tested program gets. ``K`` is the length of the longest reduction. Its terms are taken to be no larger than the
    result; where large terms cancel, ``largest_summand`` says how large they are, in units of the result.
    """
    low = [np.asarray(x, dtype=dtype) if _is_float(x) else x for x in inputs]
    high = [x.astype(np.float64) if _is_float(x) else x for x in low]
    references = [np.asarray(r, dtype=np.float64) for r in evaluate(*high)]
    plain = evaluate(*low)
    assert all(r.dtype == dtype for r in plain), "the reference must compute in the precision of its inputs"
    runs = [plain, *(evaluate(*_moved(low, rng)) for _ in range(PERTURBATIONS))]
    ulp = float(np.finfo(dtype).eps)
    out = []
    for i, reference in enumerate(references):
        errors = [_difference(run[i], reference) for run in runs]
        size = np.abs(_finite(reference)).max(initial=0.0)
        summand = max(size, largest_summand) * np.sqrt(K)
        out.append(
            Allowance(
                reference,
                largest=2 * max(np.abs(e).max(initial=0.0) for e in errors) + 2 * ulp * summand,
                rms=2 * max(map(_rms, errors)) + 2 * ulp * summand,
            )
        )
    return out


def _is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray | np.floating) and x.dtype.kind == "f"


def assert_within(
    results: Sequence[np.ndarray], allowed: Sequence[Allowance], what: str, names: Sequence[str] = ()
) -> float:
    """Print the share of the allowance that each result uses, fail above 1, and return the largest."""
    worst = 0.0
    for i, (result, allowance) in enumerate(zip(results, allowed, strict=True)):
        used = allowance.used(np.asarray(result))
        print(f"{what} {names[i] if names else i}: measured/allowed {used:.3g}")
        worst = max(worst, used)
    assert worst <= 1, f"{what}: error is {worst:.3g} of what is allowed"
    return worst
