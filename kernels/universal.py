"""What must hold of every kernel whatever it computes: layouts, guard zones, untouched inputs, equal runs.

`properties` makes the list for a family out of its strategy and its expectations.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels import launching
from kernels.problem import BORDER, Problem, mismatches, stranger, to_array
from kernels.property import Property
from kernels.subject import Subject, equal, execute, remembered, seen
from kernels.tolerance import Expectation, Verdict, judge

Expectations = Callable[[Problem], list[Expectation]]


def properties(
    functions: tuple[str, ...],
    draw: Callable,
    expectations: Expectations,
    *,
    share: float = 0.25,
    gradient: bool = True,
) -> tuple[Property, ...]:
    """The universal properties for a family's functions; ``gradient`` false where results have none to compare."""
    return (
        Property("reference", functions, draw, lambda s, p: reference(s, p, expectations)),
        *(
            (Property("gradient", functions, draw, lambda s, p: gradients(s, p, expectations), gradient=True),)
            if gradient
            else ()
        ),
        Property("layouts", functions, draw, lambda s, p: layouts(s, p, expectations), share=share),
        Property("inputs-unchanged", functions, draw, unchanged, share=share),
        Property("contract", functions, draw, contract, share=share),
        Property("guard-zones", functions, draw, guards, share=share, ours_only=True),
        Property("deterministic", functions, draw, twice, share=share),
    )


def judged(tensors: Sequence[torch.Tensor | None], expected: Sequence[Expectation]) -> list[Verdict]:
    """A verdict for every tensor that exists."""
    return [judge(to_array(t), e) for t, e in zip(tensors, expected) if t is not None]


def within(name: str, error: np.ndarray, allowed: Any) -> Verdict:
    """The worst entry of an error that is already a difference."""
    zero = Expectation(name, np.zeros_like(error), np.broadcast_to(allowed, error.shape), np.inf)
    return judge(error, zero)


def changed(problem: Problem, cotangents: dict[str, Any] | None = None, **inputs: np.ndarray) -> Problem:
    """The same problem with other values."""
    return replace(problem, inputs={**problem.inputs, **inputs}, cotangents=cotangents or problem.cotangents)


def reference(subject: Subject, problem: Problem, expectations: Expectations) -> list[Verdict]:
    """Values are those of the reference."""
    return judged(execute(subject, problem, gradients=False).outputs, expected(subject, problem, expectations))


def gradients(subject: Subject, problem: Problem, expectations: Expectations) -> list[Verdict]:
    """Gradients are those of the reference."""
    run = seen(subject, problem)
    return judged(run.gradients, expected(subject, problem, expectations)[len(run.outputs) :])


def expected(subject: Subject, problem: Problem, expectations: Expectations) -> list[Expectation]:
    """The truth about a problem, worked out once."""
    return remembered(subject, expectations, problem, lambda: expectations(problem))


def layouts(subject: Subject, problem: Problem, expectations: Expectations) -> list[Verdict]:
    """Strides do not change the result: not one bit where tiles are the same, and within the rule on a GPU."""
    a, b = seen(subject, problem), execute(subject, replace(problem, layouts={}))
    if subject.ours and not subject.gpu:
        return [equal("all results", list(zip(a.results, b.results)))]
    verdicts = []
    for x, y, rule in zip(a.outputs + a.gradients, b.outputs + b.gradients, expectations(problem)):
        if x is not None and y is not None:
            same = torch.eq(x, y).cpu().numpy()
            verdicts.append(within(rule.name, np.where(same, 0, np.abs(to_array(x) - to_array(y))), 2 * rule.allowed))
    return verdicts


def unchanged(subject: Subject, problem: Problem) -> list[Verdict]:
    """Inputs and cotangents keep their bits, and so does the memory around and between them."""
    return [Verdict("inputs", sum(placed.untouched() for placed in seen(subject, problem).placed), 0.0)]


def contract(subject: Subject, problem: Problem) -> list[Verdict]:
    """Shapes and dtypes of results are those promised; ours are contiguous."""
    run = seen(subject, problem)
    named = [
        *zip(problem.cotangents, run.outputs, problem.cotangents.values()),
        *zip(("d" + name for name in problem.inputs), run.gradients, problem.inputs.values()),
    ]
    wrong = 0
    for name, tensor, like in named:
        if tensor is not None and like is not None:
            wanted = problem.dtypes.get(name, problem.dtype_of(name.removeprefix("d")))
            wrong += tuple(tensor.shape) != like.shape or str(tensor.dtype) != f"torch.{wanted}"
            wrong += subject.ours and not tensor.is_contiguous()
    return [Verdict("shape, dtype, layout", int(wrong), 0.0)]


def guards(subject: Subject, problem: Problem) -> list[Verdict]:
    """Every buffer the kernels write is filled completely, and nothing before or behind it is written."""
    held, original = [], launching.empty

    def guarded(shape, dtype, device):
        count = int(np.prod(shape))
        buffer = torch.full((count + 2 * BORDER,), stranger(dtype), dtype=dtype, device=device)
        held.append((buffer, buffer.clone(), count))
        return buffer[BORDER : BORDER + count].view(shape)

    launching.empty = guarded
    try:
        execute(subject, problem)
    finally:
        launching.empty = original
    outside = sum(
        mismatches(now[part], then[part])
        for now, then, count in held
        for part in (slice(BORDER), slice(BORDER + count, None))
    )
    unwritten = sum(_unwritten(now[BORDER : BORDER + count]) for now, _, count in held)
    return [Verdict("written outside", outside, 0.0), Verdict("left unwritten", unwritten, 0.0)]


def _unwritten(buffer: torch.Tensor) -> int:
    """How many elements still hold what no result holds (truth values cannot show it)."""
    if buffer.dtype in (torch.bool, torch.int8, torch.uint8):
        return 0
    return int((torch.isnan(buffer) if buffer.is_floating_point() else buffer == stranger(buffer.dtype)).sum())


def twice(subject: Subject, problem: Problem) -> list[Verdict]:
    """Two runs agree in every bit."""
    a, b = seen(subject, problem), execute(subject, problem)
    return [equal("all results", list(zip(a.results, b.results)))]
