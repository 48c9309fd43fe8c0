"""What is compared with the reference: our kernels, or a function out of a reader's own file."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.problem import Placed, Problem, mismatches, place
from kernels.tolerance import Verdict


class UsageError(Exception):
    """The command was called with something that cannot be used; the message says what and what to do."""


@dataclass(frozen=True)
class Subject:
    """Functions on torch tensors under the names of a family's reference, and where they run.

    ``memory`` holds runs and expectations of problems already seen, for one search: several properties look at the
    same problems, and in the interpreter a run takes most of the time.
    """

    functions: Mapping[str, Callable]
    device: str
    backend: str
    ours: bool = True
    differentiable: bool = True
    memory: dict[Any, Any] | None = field(default=None, compare=False)

    @property
    def gpu(self) -> bool:
        """Whether kernels are compiled and not interpreted."""
        return self.device != "cpu"


@dataclass
class Run:
    """Outputs and gradients of one call, and the guarded buffers it was given."""

    outputs: list[torch.Tensor]
    gradients: list[Any]
    placed: list[Placed]

    @property
    def results(self) -> list[torch.Tensor]:
        """Outputs, then the gradients that exist."""
        return [*self.outputs, *(g for g in self.gradients if g is not None)]


def execute(subject: Subject, problem: Problem, gradients: bool = True) -> Run:
    """Call the subject's function on a problem and, if asked and possible, pull its cotangents back.

    An input that the output does not depend on gets a gradient of zeros; where the subject has no gradient at
    all, every gradient is None.
    """
    pulled_back = [name for name, cotangent in problem.cotangents.items() if cotangent is not None]
    gradients = gradients and subject.differentiable and bool(pulled_back)
    placed, constants = placed_operands(subject, problem)
    tensors = [p.tensor.detach().requires_grad_(gradients) for p in placed]
    held = [*placed, *(c for c in constants if c is not None)]
    outputs = subject.functions[problem.function](
        *tensors, *(None if c is None else c.tensor for c in constants), *problem.parameters.values()
    )
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    if len(outputs) != len(problem.cotangents) or not all(isinstance(o, torch.Tensor) for o in outputs):
        wanted, found = ", ".join(problem.cotangents), ", ".join(type(o).__name__ for o in outputs)
        raise TypeError(f"{problem.function} must return tensors ({wanted}), got ({found}).")
    if not gradients:
        return Run([o.detach() for o in outputs], [None] * len(tensors), held)
    seeds = [
        place(a, problem.dtype_of(n), subject.device, problem.layouts.get("d" + n, ""))
        for n, a in problem.cotangents.items()
        if a is not None
    ]
    smooth = [o for n, o in zip(problem.cotangents, outputs) if n in pulled_back]
    pulled = torch.autograd.grad(smooth, tensors, [s.tensor for s in seeds], allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, pulled)]
    return Run([o.detach() for o in outputs], found, held + seeds)


def remembered(subject: Subject, what: Any, problem: Problem, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, made once for ``what`` and a problem where the subject has a memory."""
    if subject.memory is None:
        return make()
    key = what, problem.fingerprint()
    if key not in subject.memory:
        subject.memory[key] = make()
    return subject.memory[key]


def seen(subject: Subject, problem: Problem) -> Run:
    """`execute`, or the run of the same problem that another property has made. Not to be changed."""
    return remembered(subject, subject.functions[problem.function], problem, lambda: execute(subject, problem))


def placed_operands(subject: Subject, problem: Problem) -> tuple[list[Placed], list[Placed | None]]:
    """The problem's inputs and constants in guarded buffers on the subject's device, in order."""

    def put(name: str, array: np.ndarray, dtype: str) -> Placed:
        return place(array, dtype, subject.device, problem.layouts.get(name, ""))

    inputs = [put(name, a, problem.dtype_of(name)) for name, a in problem.inputs.items()]
    return inputs, [None if a is None else put(name, a, a.dtype.name) for name, a in problem.constants.items()]


def equal(name: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Verdict:
    """A verdict on equality: how many elements differ in their bits, of 0 allowed."""
    return Verdict(name, sum(mismatches(a, b) for a, b in pairs), 0.0)


def reader_function(spec: str, references: Mapping[str, Callable]) -> tuple[str, Callable]:
    """Load ``FILE.py:NAME`` and say which reference it is to be held against: by its name, or by its parameters."""
    file, separator, name = spec.rpartition(":")
    path = Path(file)
    if not separator or path.suffix != ".py" or not name.isidentifier():
        raise UsageError(f"--impl: FILE.py:NAME is wanted (a Python file and a function in it), got {spec!r}.")
    if not path.is_file():
        raise UsageError(f"--impl: there is no file {file}. Give a path from the current folder.")
    module_spec = importlib.util.spec_from_file_location("reader_implementation", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["reader_implementation"] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--impl: {file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        raise UsageError(f"--impl: {file} has no function {name!r}; it has {', '.join(there) or 'none'}.")
    if name in references:
        return name, function
    wanted = {key: _parameters(reference) for key, reference in references.items()}
    found = _parameters(function)
    for key, parameters in wanted.items():
        if found == parameters:
            return key, function
    listing = "; ".join(f"{key}({', '.join(parameters)})" for key, parameters in wanted.items())
    raise UsageError(
        f"--impl: {name}({', '.join(found)}) matches none of the references by name or by parameters. "
        f"Give it the name or the parameters of one of: {listing}."
    )


def _parameters(function: Callable) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def has_gradient(subject: Subject, problem: Problem) -> bool:
    """Whether the function's outputs carry a gradient; a function that raises is left to the properties."""
    placed, constants = placed_operands(subject, problem)
    try:
        outputs = subject.functions[problem.function](
            *[p.tensor.detach().requires_grad_() for p in placed],
            *(None if c is None else c.tensor for c in constants), *problem.parameters.values(),
        )  # fmt: skip
    except Exception:
        return True
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    smooth = [o for o, cotangent in zip(outputs, problem.cotangents.values()) if cotangent is not None]
    return bool(smooth) and all(isinstance(o, torch.Tensor) and o.requires_grad for o in smooth)
