"""The attention family as the commands see it: its functions, references and properties."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.attention import op, problems, reference
from kernels.attention.properties import PROPERTIES, expectations
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
    shape = (2, 1, 4) if function in problems.PACKED else (1, 1, 2, 4)
    cotangents = {name: np.ones(shape if name == "o" else (1, 1, 2)) for name in problems.OUTPUTS[function]}
    constants: dict[str, Any] = {"key_lengths": None, "prefix": None}
    if function in problems.PACKED:
        constants = {name: np.array([0, 2], np.int32) for name in ("starts_q", "starts_k")}
    how = {"causal": False, "window": None, "align": "bottom-right", "scale": None, "softcap": None}
    return Problem(
        function, "float32", {name: np.ones(shape) for name in "qkv"}, cotangents, how,
        constants=constants, dtypes={"lse": "float32"},
    )  # fmt: skip
