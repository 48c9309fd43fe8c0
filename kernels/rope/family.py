"""The rotary family as the commands see it: its function, reference and properties."""

from collections.abc import Callable

import numpy as np

from kernels.problem import Problem
from kernels.rope import op, problems, reference
from kernels.rope.properties import PROPERTIES, expectations

__all__ = ["PROPERTIES", "expectations", "functions", "references", "result_names", "smallest_problem"]


def result_names(function: str) -> tuple[str, ...]:
    """The output, then the gradient."""
    return problems.result_names[function]


def functions() -> dict[str, Callable]:
    """Our kernel, by the name of its reference."""
    return {"rope": op.rope}


def references() -> dict[str, Callable]:
    """The function that says what is right."""
    return {"rope": reference.rope}


def smallest_problem(function: str) -> Problem:
    """A problem that anything can run, to see whether gradients flow."""
    return Problem(
        function, "float32", {"x": np.ones((1, 2))}, {"y": np.ones((1, 2))}, {"start": 0, "pairing": "half"},
        constants={"cos": np.ones((1, 1), np.float32), "sin": np.zeros((1, 1), np.float32), "positions": None},
    )  # fmt: skip
