"""Products with quantised weights as the commands see them: functions, references and properties."""

from collections.abc import Callable

import numpy as np

from kernels.problem import Problem
from kernels.quantised import op, problems, reference
from kernels.quantised.properties import PROPERTIES, expectations

__all__ = ["PROPERTIES", "expectations", "functions", "references", "result_names", "smallest_problem"]

result_names = problems.result_names


def functions() -> dict[str, Callable]:
    """Our kernels, by the names of their references."""
    return {name: getattr(op, name) for name in problems.FUNCTIONS}


def references() -> dict[str, Callable]:
    """The functions that say what is right."""
    return {name: getattr(reference, name) for name in problems.FUNCTIONS}


def smallest_problem(function: str) -> Problem:
    """A problem that anything can run, to see whether gradients flow."""
    constants, parameters = problems.stored(np.random.default_rng(0), function, 2, 2, 2)
    one = {"x": np.ones((1, 2))}, {"y": np.ones((1, 2))}
    return Problem(function, "float32", *one, parameters, constants=constants)
