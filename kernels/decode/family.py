"""The decode family as the commands see it: its functions, references and properties."""

from collections.abc import Callable

import numpy as np

from kernels.decode import op, problems, reference
from kernels.decode.properties import PROPERTIES, expectations
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
    """A problem that anything can run. No output has a gradient here."""
    shapes = {"q": (1, 1, 1, 2), "k": (1, 1, 1, 2), "v": (1, 1, 1, 2), "c": (1, 1, 2), "o": (1, 1, 2), "lse": (1, 1)}
    inputs = {name: np.ones(shapes[name]) for name in problems.INPUTS[function]}
    constants, parameters = {}, {}
    if function != "merge_attention":
        constants["lengths"] = None
        parameters = {"scale": None, "window": None, "softcap": None}
    if function == "paged_decode_attention":
        constants["table"] = np.zeros((1, 1), np.int32)
    if function == "latent_decode_attention":
        parameters = {"d_v": 1, **parameters}
    return Problem(
        function,
        "float32",
        inputs,
        {"o": None, "lse": None},
        parameters,
        constants=constants,
        dtypes={"lse": "float32"},
    )
