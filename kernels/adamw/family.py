"""AdamW as the commands see it: functions, references and properties."""

from collections.abc import Callable

import numpy as np

from kernels.adamw import op, problems, reference
from kernels.adamw.properties import PROPERTIES, expectations
from kernels.problem import Problem

__all__ = ["PROPERTIES", "expectations", "functions", "references", "result_names", "smallest_problem"]

result_names = problems.result_names


def functions() -> dict[str, Callable]:
    """Our kernels, by the names of their references."""
    return {name: getattr(op, name) for name in problems.OPERANDS}


def references() -> dict[str, Callable]:
    """The functions that say what is right."""
    return {name: getattr(reference, name) for name in problems.OPERANDS}


def smallest_problem(function: str) -> Problem:
    """A problem that anything can run; a step has no gradient of its own."""
    inputs = {name: np.ones((1, 1)) for name in problems.OPERANDS[function]}
    return problems.made(function, "float32", inputs, problems.SETTINGS)
