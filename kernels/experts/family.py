"""The family of experts as the commands see it: its functions, references and properties."""

from collections.abc import Callable

import numpy as np

from kernels.experts import op, problems, reference
from kernels.experts.properties import PROPERTIES, expectations
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
    shapes = {"logits": (2, 2), "x": (2, 2), "w": (1, 2, 2), "gates": (2, 1), "w_in": (1, 4, 2), "w_down": (1, 2, 2)}
    inputs = {name: np.ones(shapes[name]) for name in problems.INPUTS[function]}
    numbers = np.zeros((2, 1), np.int32)
    constants = {
        "route": {"bias": None}, "pack": {"experts": numbers}, "grouped_linear": {"offsets": np.array([0, 2], np.int32)},
        "mixture_of_experts": {"experts": numbers},
    }[function]  # fmt: skip
    cotangents = {
        "route": {"gates": np.ones((2, 1)), "experts": None, "loads": None, "aux": np.ones(()), "z": np.ones(())},
        "pack": dict.fromkeys(problems.OUTPUTS["pack"]),
    }.get(function, {"y": np.ones((2, 2))})  # fmt: skip
    parameters = {
        "route": {"k": 1, "scoring": "softmax", "renormalise": True}, "pack": {"n_experts": 1, "capacity": None},
        "mixture_of_experts": {"capacity": None},
    }.get(function, {})  # fmt: skip
    return Problem(function, "float32", inputs, cotangents, parameters, constants=constants, dtypes=problems.DTYPES)
