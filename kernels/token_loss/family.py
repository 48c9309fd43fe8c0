"""The token_loss family as the commands see it: its functions, references and properties."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.problem import Problem
from kernels.token_loss import op, problems, reference
from kernels.token_loss.properties import PROPERTIES, expectations

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
    lead = (1, 1) if function in problems.POLICY else (1,)
    inputs = {name: np.ones((2, 2) if name == "weight" else (*lead, 2)) for name in problems.inputs_of(function)}
    constants, parameters = {}, {}
    if function not in problems.ROWS_ONLY:
        constants = {"targets": np.zeros(lead, np.int64)}
    if function in problems.STATISTICS:
        parameters = {"temperature": 1.0, "ignore_index": problems.IGNORE}
    elif function in problems.LIKELIHOOD:
        parameters = {"ignore_index": problems.IGNORE, "reduction": "sum", "divisor": None, "label_smoothing": 0.0,
                      "z_loss": 0.0}  # fmt: skip
    elif function in problems.POLICY:
        one = np.ones(lead, np.float32)
        constants |= {"old_logprobs": -0.7 * one, "advantages": one, "mask": one == 1, "ref_logprobs": None,
                      "token_weights": None}  # fmt: skip
        parameters = {
            "clip_low": 0.2, "clip_high": None, "dual_clip": None, "level": "token", "beta": 0.0, "kl": "k3",
            "kl_ratio": False, "entropy_coef": 0.0, "reduction": "sum", "length": None, "divisor": None,
            "temperature": 1.0, "ignore_index": problems.IGNORE,
        }  # fmt: skip
    cotangents: dict[str, Any] = {name: None for name in problems.outputs_of(function)}
    first = problems.outputs_of(function)[0]
    cotangents[first] = (
        np.ones((*lead, 2)) if function in problems.ROWS_ONLY else np.ones(()) if first == "loss" else np.ones(lead)
    )
    return Problem(function, "float32", inputs, cotangents, parameters, constants=constants,
                   dtypes=problems.own_dtypes(function))  # fmt: skip
