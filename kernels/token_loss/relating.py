"""What the relations of this family are written with: runs by name, problems with other numbers, differences."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.subject import Run, Subject, execute
from kernels.token_loss import problems as p
from kernels.tolerance import Verdict
from kernels.universal import within


def named(run: Run, problem: Problem) -> dict[str, torch.Tensor]:
    """The results of a run by name."""
    return dict(zip(p.result_names(problem.function), [*run.outputs, *run.gradients]))


def run(subject: Subject, problem: Problem, gradients: bool = True) -> dict[str, Any]:
    """Call the subject on a problem: its results by name."""
    return named(execute(subject, problem, gradients), problem)


def with_(problem: Problem, **parameters: Any) -> Problem:
    """The problem with other parameters."""
    return replace(problem, parameters={**problem.parameters, **parameters})


def data(problem: Problem, **constants: Any) -> Problem:
    """The problem with other constants."""
    return replace(problem, constants={**problem.constants, **constants})


def apart(name: str, a: Any, b: Any, allowed: Any) -> Verdict:
    """The largest difference of two results, against what is allowed."""
    a, b = (to_array(x) if isinstance(x, torch.Tensor) else np.asarray(x) for x in (a, b))
    return within(name, np.atleast_1d(np.abs(a - b)), allowed)


def first(problem: Problem) -> str:
    """The name of the first input's gradient."""
    return "d" + p.inputs_of(problem.function)[0]


def draw(**options: Any):
    """A strategy without odd layouts, which other properties look at."""
    options = {"layouts": False, "dirty": False, **options}
    return lambda function, dtype, gpu: p.problems(function, dtype, gpu, **options)


def relation(name: str, functions: tuple[str, ...], check, gradient: bool = False, share: float = 0.25, **options):
    """A property that holds between results."""
    return Property(name, functions, draw(**options), check, gradient=gradient, share=share)
