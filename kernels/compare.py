"""`python -m kernels compare`: a family's properties, searched by hypothesis, against the NumPy reference."""

import builtins
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm

from kernels import mode, registry
from kernels.problem import Problem
from kernels.property import Property
from kernels.subject import Subject, has_gradient, reader_function
from kernels.tolerance import Verdict

LARGEST = sys.float_info.max  # stands for infinity, which JSON does not have


@dataclass(frozen=True)
class Outcome:
    """What a search found: the worst verdict, the problem it belongs to, and the smallest failing one if any."""

    family: str
    property: str
    function: str
    dtype: str
    backend: str
    verdict: Verdict
    problem: Problem | None
    error: str = ""

    @builtins.property  # the bare name is a field here, as the JSON wants
    def passed(self) -> bool:
        """Whether everything that was tried held."""
        return not self.error and self.verdict.passed

    def row(self) -> dict[str, Any]:
        """The JSON object of the command."""
        return {
            "family": self.family, "property": self.property, "function": self.function, "dtype": self.dtype,
            "backend": self.backend, "measured": min(float(self.verdict.measured), LARGEST),
            "allowed": min(float(self.verdict.allowed), LARGEST), "passed": self.passed, "what": self.verdict.name,
            "case": repr(self.problem) if self.problem else "", "error": self.error,
        }  # fmt: skip


def search(
    prop: Property, family: str, function: str, dtype: str, subject: Subject, examples: int, number: int
) -> Outcome:
    """Try a property on many problems; on failure let hypothesis find a small one."""
    worst = Verdict("", 0.0, 0.0)
    where: Problem | None = None
    failed: tuple[Problem, Verdict, str] | None = None

    @seed(number)
    @settings(
        max_examples=prop.examples(examples), deadline=None, database=None, report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink), derandomize=False,
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
    )  # fmt: skip
    @given(prop.strategy(function, dtype, subject.gpu))
    def run(problem: Problem) -> None:
        nonlocal worst, where, failed
        try:
            with np.errstate(all="ignore"):  # 0 * inf is the right answer to some problems
                verdicts = prop.check(subject, problem)
        except Exception as error:
            text = "".join(traceback.format_exception_only(error)).strip()
            failed = problem, Verdict(f"raised {type(error).__name__}", LARGEST, 0.0), text
            raise
        found = max(verdicts, key=lambda verdict: verdict.ratio, default=Verdict("", 0.0, 0.0))
        if where is None or found.ratio > worst.ratio:
            worst, where = found, problem
        if not found.passed:
            failed = problem, found, ""
            raise AssertionError(f"{found.name}: measured {found.measured:.3g}, allowed {found.allowed:.3g}")

    try:
        run()
    except Exception as error:
        if failed is None:  # hypothesis itself gave up: a strategy without examples, an internal error
            return Outcome(family, prop.name, function, dtype, subject.backend, worst, where, repr(error))
        problem, verdict, text = failed
        return Outcome(family, prop.name, function, dtype, subject.backend, verdict, problem, text)
    return Outcome(family, prop.name, function, dtype, subject.backend, worst, where)


def larger_failure(
    outcome: Outcome, subject: Subject, examples: int = 12, number: int = 0, limit: int = 8192
) -> Problem | None:
    """The largest of some drawn problems that fail as an outcome did: where the smallest is too small for a pattern."""
    prop = next(p for p in registry.load(outcome.family).PROPERTIES if p.name == outcome.property)
    found: list[Problem] = []

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=(Phase.generate,), derandomize=False,
        suppress_health_check=list(HealthCheck),  # type: ignore[arg-type]
    )  # fmt: skip
    @given(prop.strategy(outcome.function, outcome.dtype, subject.gpu))
    def run(problem: Problem) -> None:
        if len(problem) > limit:
            return
        try:
            with np.errstate(all="ignore"):
                failed = not all(verdict.passed for verdict in prop.check(subject, problem))
        except Exception:
            failed = False
        if failed:
            found.append(problem)

    try:
        run()
    except Exception:  # hypothesis itself gave up: there is no larger case, then
        return None
    return max(found, key=len, default=None)


def our_subject(family: str) -> Subject:
    """Our kernels of a family, on the GPU if there is one."""
    return Subject(registry.load(family).functions(), *place_of_work())


def place_of_work() -> tuple[str, str]:
    """The device that tensors are put on and the name of the backend."""
    if torch.cuda.is_available() and not mode.interpreted():
        return "cuda", torch.cuda.get_device_name()
    return "cpu", "interpreter"


def compare(
    family: str,
    subject: Subject | None = None,
    *,
    examples: int = 25,
    number: int = 0,
    dtypes: Sequence[str] | None = None,
    properties: Sequence[str] | None = None,
    progress: bool = False,
) -> list[Outcome]:
    """Every property of a family on every function and dtype of a subject (ours by default).

    This is what a mutation run calls: it needs nothing but the family's name.
    """
    described = registry.load(family)
    subject = subject or our_subject(family)
    if not subject.gpu:  # where problems are small; kernels may have changed since an earlier search
        subject = replace(subject, memory={})
    dtypes = dtypes or (("float32", "float16", "bfloat16") if subject.gpu else ("float32", "float16"))
    jobs = [
        (prop, function, dtype)
        for prop in described.PROPERTIES
        for function in prop.functions
        for dtype in dtypes
        if function in subject.functions
        and (properties is None or prop.name in properties)
        and (subject.ours or not prop.ours_only)
        and (subject.differentiable or not prop.gradient)
    ]
    outcomes = []
    with tqdm(jobs, file=sys.stderr, disable=None if progress else True, unit="check", leave=False) as bar:
        for prop, function, dtype in bar:
            bar.set_description(f"{family} {prop.name} {function} {dtype}")
            outcomes.append(search(prop, family, function, dtype, subject, examples, number))
    return outcomes


def reader_subject(family: str, spec: str) -> Subject:
    """A reader's function, and whether a gradient flows through it."""
    described = registry.load(family)
    name, function = reader_function(spec, described.references())
    subject = Subject({name: function}, *place_of_work(), ours=False)
    return replace(subject, differentiable=has_gradient(subject, described.smallest_problem(name)))


def report(outcomes: Sequence[Outcome]) -> str:
    """A table of worst ratios by property, and the smallest failing case of each failure."""
    wide = 2 + max([len(o.property) for o in outcomes], default=8)
    wider = 2 + max([len(o.function) for o in outcomes], default=8)
    lines = [f"{'property':<{wide}}{'function':<{wider}}{'dtype':<10}{'measured':>11}{'allowed':>11}{'ratio':>7}"]
    for o in outcomes:
        ratio = f"{o.verdict.ratio:.2f}" if o.verdict.allowed else "=" if o.passed else "/="
        mark = "" if o.passed else "   FAILED"
        measured, allowed = f"{o.verdict.measured:.2e}", f"{o.verdict.allowed:.2e}"
        lines.append(
            f"{o.property:<{wide}}{o.function:<{wider}}{o.dtype:<10}{measured:>11}{allowed:>11}{ratio:>7}{mark}"
        )
    for o in outcomes:
        if not o.passed:
            lines += ["", f"{o.property} fails ({o.verdict.name}: measured {o.verdict.measured:.3g}, "
                      f"allowed {o.verdict.allowed:.3g}). Smallest case found:"]  # fmt: skip
            lines += [o.problem.show() if o.problem else "", *([o.error] if o.error else [])]
    return "\n".join(lines)
