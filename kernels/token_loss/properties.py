"""What must hold of the family: agreement with the reference, what holds of every kernel, and relations of its own."""

import numpy as np

from kernels import universal
from kernels.problem import Problem
from kernels.token_loss import problems as p
from kernels.token_loss import reference
from kernels.token_loss.scales import scales
from kernels.tolerance import Expectation, expect

FUNCTIONS = p.FUNCTIONS


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about every output and gradient, in order of `problems.result_names`."""
    names = p.result_names(problem.function)
    originals = list(problem.inputs.values())

    def keep_infinities(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [np.where(np.isneginf(o), o, a) for o, a in zip(originals, arrays)]

    return expect(
        getattr(reference, problem.function), originals, list(problem.cotangents.values()), problem.dtype, names,
        scales(problem), cast=keep_infinities, constants=list(problem.constants.values()),
        dtypes=[problem.dtypes.get(name, problem.dtype) for name in names], **problem.parameters,
    )  # fmt: skip


def _draw(**options):
    return lambda function, dtype, gpu: p.problems(function, dtype, gpu, **options)


PROPERTIES = (*universal.properties(FUNCTIONS, _draw(), expectations),)
