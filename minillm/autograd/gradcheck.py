r"""The gradient check: is a derivative what it claims to be?

Equation: `gradient-check` $\partial f/\partial x_i\approx\frac{f(x+he_i)-f(x-he_i)}{2h}$
Source: topics #8.

The function is evaluated in float64 at $x\pm h$ with $h=\epsilon^{1/3}\max(1,|x|)$, which balances the truncation
error, of order $h^2$, against rounding, of order $\epsilon/h$. How far the numerical derivative itself may be off is
estimated by halving $h$: three times that change is allowed, and $10^{-7}$ (relative) in any case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.registry import Row
from minillm.autograd.tape import grad, no_grad
from minillm.autograd.tensor import Tensor

FLOOR = 1e-7
ELEMENTWISE_UP_TO = 64


@dataclass(frozen=True)
class GradCheckResult:
    """The outcome for one function: worst relative error, what is allowed, and where it happened."""

    name: str
    max_rel_error: float
    allowed: float
    worst: str
    checks: int = 1

    @property
    def passed(self) -> bool:
        """Whether the worst error is within its allowance (NaN is not)."""
        return bool(self.max_rel_error <= self.allowed)


class GradientError(AssertionError):
    """A gradient differs from the finite difference; the message names the worst entry."""


def gradcheck(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: dict | None = None,
    *,
    name: str = "",
    rng: np.random.Generator | None = None,
    raise_on_failure: bool = True,
) -> GradCheckResult:
    r"""Compare the gradient of a function with central differences in float64.

    Equation: `gradient-check` $\partial f/\partial x_i\approx\frac{f(x+he_i)-f(x-he_i)}{2h}$
    Shapes: inputs of any shape; floating-point inputs are checked, others are passed through.
    Raises: GradientError naming the worst entry; ValueError if no input is floating point.
    Source: topics #8; the projection test follows the idea of HIPS autograd's check_grads.

    The outputs are contracted with a random cotangent $\bar y$, so that $\phi(x)=\langle\bar y,f(x)\rangle$ is a scalar.
    Then $\langle\nabla\phi,v\rangle$ is compared for a random direction $v$, and, for inputs of at most
    64 elements, every entry of $\nabla\phi$ by itself.
    """
    rng = rng or np.random.default_rng(0)
    name = name or getattr(function, "__name__", repr(function))
    arrays = [np.array(a.data if isinstance(a, Tensor) else a) for a in inputs]
    arrays = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]
    slots = [i for i, a in enumerate(arrays) if a.dtype.kind == "f"]
    if not slots:
        raise ValueError(f"gradcheck: {name} needs at least one floating-point input, got none.")

    def outputs_at(values: list[np.ndarray], requires_grad: bool) -> tuple[list[Any], list[Tensor]]:
        given = [Tensor(v, requires_grad) if i in slots else inputs[i] for i, v in enumerate(values)]
        result = function(*given, **(kwargs or {}))
        results = list(result) if isinstance(result, tuple | list) else [result]
        return given, [r for r in results if isinstance(r, Tensor) and r.dtype.kind == "f"]

    given, results = outputs_at(arrays, True)
    cotangents = [rng.normal(size=r.shape) for r in results]
    live = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    tensors = [given[i] for i in slots]
    gradients = (
        grad([r for r, _ in live], tensors, [c for _, c in live], allow_unused=True) if live else [None] * len(slots)
    )
    exact = [np.zeros(t.shape) if g is None else g.data for t, g in zip(tensors, gradients, strict=True)]

    def phi(values: list[np.ndarray]) -> float:
        with no_grad():
            _, outs = outputs_at(values, False)
        return float(sum(np.sum(c * o.data) for c, o in zip(cotangents, outs, strict=True)))

    def central(directions: dict[int, np.ndarray], h: float) -> float:
        ahead = [a + h * directions[i] if i in directions else a for i, a in enumerate(arrays)]
        behind = [a - h * directions[i] if i in directions else a for i, a in enumerate(arrays)]
        return (phi(ahead) - phi(behind)) / (2 * h)

    worst = GradCheckResult(name, 0.0, FLOOR, "")
    checks = 0

    def compare(directions: dict[int, np.ndarray], claimed: float, size: float, where: str) -> None:
        nonlocal worst, checks
        h = np.finfo(np.float64).eps ** (1 / 3) * max(1.0, size)
        numeric, finer = central(directions, h), central(directions, h / 2)
        scale = max(1.0, abs(numeric), abs(claimed))
        error = abs(claimed - finer) / scale
        allowed = max(FLOOR, 3 * abs(numeric - finer) / scale)
        checks += 1
        if np.isfinite(worst.max_rel_error) and not error / allowed <= worst.max_rel_error / worst.allowed:
            worst = GradCheckResult(
                name, float(error), float(allowed), f"{where}: gradient {claimed:.10g}, finite difference {finer:.10g}"
            )

    direction = {i: rng.normal(size=arrays[i].shape) for i in slots}
    norm = np.sqrt(sum(float(np.sum(v * v)) for v in direction.values())) or 1.0
    direction = {i: v / norm for i, v in direction.items()}
    claimed = float(sum(np.sum(g * direction[i]) for i, g in zip(slots, exact, strict=True)))
    compare(direction, claimed, 1.0, "along a random direction")
    for i, gradient in zip(slots, exact, strict=True):
        if arrays[i].size <= ELEMENTWISE_UP_TO:
            for index in np.ndindex(arrays[i].shape):
                unit = np.zeros(arrays[i].shape)
                unit[index] = 1.0
                compare({i: unit}, float(gradient[index]), abs(float(arrays[i][index])), f"input {i}, entry {index}")
    result = GradCheckResult(name, worst.max_rel_error, worst.allowed, worst.worst, checks)
    if raise_on_failure and not result.passed:
        raise GradientError(
            f"gradcheck: {name} has a wrong gradient at {result.worst} "
            f"(relative error {result.max_rel_error:.3g}, allowed {result.allowed:.3g})."
        )
    return result


def check_row(row: Row, rng: np.random.Generator, draws: int = 3) -> list[GradCheckResult]:
    """Check the gradient of every form of a registered function at some random examples; the worst of each."""
    if row.example is None:
        raise ValueError(f"gradcheck: '{row.name}' has no example to be checked at; give its registration one.")
    examples = [row.example(rng) for _ in range(draws)]
    results = []
    for kind, form in row.forms.items():
        label = row.name if kind == "primitive" else f"{row.name}[{kind}]"
        found = [
            gradcheck(form, args, kwargs, name=label, rng=rng, raise_on_failure=False) for args, kwargs in examples
        ]
        results.append(max(found, key=lambda r: np.nan_to_num(r.max_rel_error / r.allowed, nan=np.inf)))
    return results
