"""What one search remembers: the same problem is run once for all properties that look at it, and never for too long."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import compare
from kernels.norm import op
from kernels.problem import Problem
from kernels.subject import Subject, execute, seen

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")


def problem(**changes):
    x = np.arange(12.0).reshape(3, 4)
    made = Problem("f", "float32", {"x": x}, {"y": np.ones((3, 4))}, {"eps": 1e-5}, constants={"ids": None})
    return replace(made, **changes)


def test_a_fingerprint_tells_problems_apart_by_everything_but_the_note():
    x = np.arange(12.0).reshape(3, 4)
    others = [
        problem(function="g"), problem(dtype="float16"), problem(inputs={"x": x + 1}), problem(inputs={"x": x.reshape(4, 3)}),
        problem(inputs={"z": x}), problem(cotangents={"y": None}), problem(parameters={"eps": 1e-6}),
        problem(layouts={"x": "padded"}), problem(launch=(16, 16)), problem(constants={"ids": np.zeros(3, np.int64)}),
        problem(constants={"ids": np.zeros(3, np.int32)}),
    ]  # fmt: skip
    assert len({p.fingerprint() for p in (problem(), *others)}) == 1 + len(others)
    assert problem(note="said otherwise").fingerprint() == problem().fingerprint()
    assert problem(inputs={"x": np.asfortranarray(x)}).fingerprint() == problem().fingerprint()


def test_a_problem_is_run_once_with_a_memory_and_every_time_without():
    calls = []

    def f(x, ids, eps):
        calls.append(eps)
        return x + eps

    for memory, runs in ((None, 3), ({}, 2)):
        calls.clear()
        subject = Subject({"f": f}, "cpu", "interpreter", memory=memory)
        first, again = seen(subject, problem()), seen(subject, problem())
        assert (first is again) == (memory is not None)
        execute(subject, problem())  # always runs
        assert len(calls) == runs
    other = replace(subject, functions={"f": lambda x, ids, eps: x - eps})
    assert not torch.equal(seen(other, problem()).outputs[0], first.outputs[0])


def test_a_kernel_that_changes_between_two_searches_is_run_again(monkeypatch):
    subject = compare.our_subject("norm")
    some = {"examples": 3, "number": 0, "dtypes": ["float32"], "properties": ["gradient", "contract", "deterministic"]}
    assert all(outcome.passed for outcome in compare.compare("norm", subject, **some))
    original = op.launch.backward

    def wrong(*arguments, **named):
        dx, *rest = original(*arguments, **named)
        return 2 * dx, *rest

    monkeypatch.setattr(op.launch, "backward", wrong)
    failed = [outcome.property for outcome in compare.compare("norm", subject, **some) if not outcome.passed]
    assert failed and set(failed) == {"gradient"}


def test_a_kernel_that_is_not_the_same_twice_is_found(monkeypatch):
    """The run that is remembered does not stand in for the second one."""
    original, factor = op.launch.forward, [1.0]

    def drifting(*arguments, **named):
        y, *rest = original(*arguments, **named)
        factor[0] *= 1.0 + 1e-3
        return factor[0] * y, *rest

    monkeypatch.setattr(op.launch, "forward", drifting)
    outcomes = compare.compare(
        "norm", examples=3, number=0, dtypes=["float32"], properties=["contract", "deterministic"]
    )
    failed = {outcome.property for outcome in outcomes if not outcome.passed}
    assert failed == {"deterministic"}
