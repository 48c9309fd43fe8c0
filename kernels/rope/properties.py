"""What must hold of the rotation: agreement with the reference, and relations that need none."""

from dataclasses import replace

import numpy as np
import torch

from kernels import universal
from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.rope import launch, op, reference
from kernels.rope import problems as p
from kernels.subject import Subject, equal, execute
from kernels.tolerance import SPACING, Expectation, Verdict, expect
from kernels.universal import within

FUNCTIONS = ("rope",)


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about y and dx."""
    return expect(
        reference.rope, list(problem.inputs.values()), list(problem.cotangents.values()), problem.dtype,
        p.result_names["rope"], p.scales(problem), constants=list(problem.constants.values()), **problem.parameters,
    )  # fmt: skip


def _y(subject: Subject, problem: Problem) -> torch.Tensor:
    return execute(subject, problem, gradients=False).outputs[0]


def _operands(problem: Problem, device: str) -> tuple:
    x = torch.from_numpy(problem.inputs["x"]).to(device, getattr(torch, problem.dtype))
    tables = (None if a is None else torch.from_numpy(a).to(device) for a in problem.constants.values())
    return (x, *tables, *problem.parameters.values())


def _length_kept(subject: Subject, problem: Problem) -> list[Verdict]:
    """A rotation keeps the length of every row."""
    x, y = problem.inputs["x"], to_array(_y(subject, problem))
    size = np.sqrt((x**2).sum(-1, keepdims=True))
    error = np.abs(np.sqrt((y**2).sum(-1, keepdims=True)) - size)
    return [within("length", error, 4 * SPACING[problem.dtype] * size + 1e-6)]


def _there_and_back(subject: Subject, problem: Problem) -> list[Verdict]:
    """Turned back by the gradient of itself, x is x again."""
    x = problem.inputs["x"]
    y = to_array(_y(subject, problem))
    run = execute(subject, replace(problem, cotangents={"y": y}))
    size = np.abs(x).max(-1, keepdims=True, initial=0.0)
    return [within("x", np.abs(to_array(run.gradients[0]) - x), 6 * SPACING[problem.dtype] * size + 1e-6)]


def _first_position(subject: Subject, problem: Problem) -> list[Verdict]:
    """Position 0 turns nothing."""
    zeros = np.zeros(problem.inputs["x"].shape[-2], np.int64)
    still = replace(
        problem, parameters={**problem.parameters, "start": 0}, constants={**problem.constants, "positions": zeros}
    )  # fmt: skip
    y = _y(subject, still)
    return [equal("y", [(y + 0.0, torch.from_numpy(problem.inputs["x"]).to(y) + 0.0)])]


def _offset(subject: Subject, problem: Problem) -> list[Verdict]:
    """A start of s is the table from its row s on, and positions counted from s, bit by bit: what a cache needs."""
    start = problem.parameters["start"]
    cos, sin, positions = problem.constants.values()
    rest = {"cos": cos[start:], "sin": sin[start:], "positions": positions}
    places = start + np.arange(problem.inputs["x"].shape[-2]) if positions is None else positions + start
    given = {"cos": cos, "sin": sin, "positions": places}
    a = _y(subject, problem)
    others = [replace(problem, parameters={**problem.parameters, "start": 0}, constants=c) for c in (rest, given)]
    return [equal("y", [(a, _y(subject, other)) for other in others])]


def _relative(subject: Subject, problem: Problem) -> list[Verdict]:
    """The product of a turned query and a turned key depends on the distance of their positions only."""
    x = problem.inputs["x"]
    size = len(problem.constants["cos"])
    q, k = (replace(problem, inputs={"x": a}) for a in (x, np.flip(x, -1).copy()))

    def product(m: int, n: int) -> np.ndarray:
        at = [
            replace(side, parameters={**side.parameters, "start": 0},
                    constants={**side.constants, "positions": np.full(x.shape[-2], place)})
            for side, place in ((q, m), (k, n))
        ]  # fmt: skip
        return (to_array(_y(subject, at[0])) * to_array(_y(subject, at[1]))).sum(-1, keepdims=True)

    scale = (x**2).sum(-1, keepdims=True)
    return [within("product", np.abs(product(1, 0) - product(size - 1, size - 2)), 8 * SPACING[problem.dtype] * scale)]


def _in_place(subject: Subject, problem: Problem) -> list[Verdict]:
    """In place, and in other tiles, the same bits."""
    operands = _operands(problem, subject.device)
    y = op.rope(*operands)
    tiled = launch.turn(*operands, tile=problem.launch)
    return [equal("y", [(op.rope_(*operands), y), (tiled, y)])]


def _drawn(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu)


def _plain(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu, layouts=False)


def _forced(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu, layouts=False, launches=True)


PROPERTIES = (
    *universal.properties(FUNCTIONS, _drawn, expectations, share=0.5),
    Property("length-kept", FUNCTIONS, _plain, _length_kept, share=0.5),
    Property("there-and-back", FUNCTIONS, _plain, _there_and_back, gradient=True, share=0.5),
    Property("first-position", FUNCTIONS, _plain, _first_position, share=0.5),
    Property("offset", FUNCTIONS, _plain, _offset, share=0.5),
    Property("relative", FUNCTIONS, _plain, _relative, share=0.5),
    Property("in-place", FUNCTIONS, _forced, _in_place, ours_only=True, share=0.5),
)
