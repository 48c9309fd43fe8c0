"""The linear-attention family as the commands see it: its functions, references and properties."""

from collections.abc import Callable

import numpy as np

from kernels.linear_attention import op, problems, reference
from kernels.linear_attention.properties import PROPERTIES, expectations
from kernels.problem import Problem

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
    one, z = np.ones((1, 1, 1, 1)), np.ones((1, 1, 1))
    inputs = {"q": one, "k": one, "v": one, "state": one, "normaliser": z}
    seeds = {"o": one, "last": one, "last_z": z}
    return Problem(function, "float32", inputs, seeds, {"eps": problems.EPS}, dtypes=problems.SINGLE)
