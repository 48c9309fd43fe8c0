"""What must hold of the gated units: agreement with the reference, and relations that need none."""

from dataclasses import replace

import numpy as np
import torch

from kernels import universal
from kernels.activations import launch, op, reference
from kernels.activations import problems as p
from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.subject import Subject, equal, execute
from kernels.tolerance import Expectation, Verdict, expect
from kernels.universal import within

FUNCTIONS = tuple(p.OPERANDS)
JOINT = FUNCTIONS[:2]


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about the output and every gradient, in order of `problems.result_names`."""
    return expect(
        getattr(reference, problem.function), list(problem.inputs.values()), list(problem.cotangents.values()),
        problem.dtype, p.result_names(problem.function), p.scales(problem),
    )  # fmt: skip


def _with(problem: Problem, value: np.ndarray, gate: np.ndarray) -> Problem:
    """The same problem with another value and gate."""
    joint = len(problem.inputs) == 1
    inputs = {"h": np.concatenate([value, gate], -1)} if joint else {"value": value, "gate": gate}
    return replace(problem, inputs=inputs)


def _y(subject: Subject, problem: Problem) -> torch.Tensor:
    return execute(subject, problem, gradients=False).outputs[0]


def _any_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    """Other tiles give the same bits."""
    forward_tile, backward_tile = problem.launch
    silu = problem.function.startswith("swiglu")
    run = execute(subject, problem)
    v, z = (torch.from_numpy(a).to(run.outputs[0]) for a in p.value_and_gate(problem))
    dy = torch.from_numpy(problem.cotangents["y"]).to(v)
    into = torch.empty_like(v), torch.empty_like(z)
    launch.backward(dy, v, z, into, silu, backward_tile)
    joint = len(problem.inputs) == 1
    found = [torch.cat(into, -1)] if joint else list(into)
    return [equal("all results", list(zip(run.results, [launch.forward(v, z, silu, forward_tile), *found])))]


def _zero_gate(subject: Subject, problem: Problem) -> list[Verdict]:
    """A gate of 0 lets nothing through: y and the value's gradient are 0."""
    value, gate = p.value_and_gate(problem)
    run = execute(subject, _with(problem, value, 0 * gate))
    dvalue = run.gradients[0]
    found = [] if dvalue is None else [dvalue[..., : value.shape[-1]]]
    return [Verdict("not 0", float(sum(int(t.count_nonzero()) for t in [run.outputs[0], *found])), 0.0)]


def _linear_in_value(subject: Subject, problem: Problem) -> list[Verdict]:
    """Another sign of the value is another sign of y, bit by bit."""
    value, gate = p.value_and_gate(problem)
    return [equal("y", [(_y(subject, _with(problem, -value, gate)) + 0.0, -_y(subject, problem) + 0.0)])]


def _odd_part(subject: Subject, problem: Problem) -> list[Verdict]:
    """Both activations have the odd part z / 2: y(v, z) - y(v, -z) = v z."""
    value, gate = p.value_and_gate(problem)
    mirrored = _with(problem, value, -gate)
    error = to_array(_y(subject, problem)) - to_array(_y(subject, mirrored)) - value * gate
    return [within("y", np.abs(error), expectations(problem)[0].allowed + expectations(mirrored)[0].allowed)]


def _same_as_pair(subject: Subject, problem: Problem) -> list[Verdict]:
    """A joint projection and its two halves give the same bits."""
    h = torch.from_numpy(problem.inputs["h"]).to(_y(subject, problem))
    pair = getattr(op, problem.function + "_pair")
    return [equal("y", [(_y(subject, problem), pair(*launch.halves(h)))])]


def _in_place(subject: Subject, problem: Problem) -> list[Verdict]:
    """Gradients written over value and gate are the same, bit for bit."""
    run = execute(subject, problem)
    leaves = [torch.from_numpy(a).to(run.outputs[0]).requires_grad_() for a in problem.inputs.values()]
    y = getattr(op, problem.function)(*(leaf.clone() for leaf in leaves), reuse=True)
    found = torch.autograd.grad(y, leaves, torch.from_numpy(problem.cotangents["y"]).to(y))
    return [equal("gradients", list(zip(run.gradients, found)))]


def _drawn(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu)


def _plain(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu, layouts=False)


def _forced(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu, layouts=False, launches=True)


PROPERTIES = (
    *universal.properties(FUNCTIONS, _drawn, expectations),
    Property("any-launch", FUNCTIONS, _forced, _any_launch, gradient=True, ours_only=True, share=0.25),
    Property("zero-gate", FUNCTIONS, _plain, _zero_gate, share=0.25),
    Property("sign-of-value", FUNCTIONS, _plain, _linear_in_value, share=0.25),
    Property("odd-part", FUNCTIONS, _plain, _odd_part, share=0.25),
    Property("halves", JOINT, _plain, _same_as_pair, ours_only=True, share=0.25),
    Property("in-place", FUNCTIONS, _plain, _in_place, gradient=True, ours_only=True, share=0.25),
)
