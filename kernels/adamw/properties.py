"""What must hold of AdamW: agreement with the reference over one step and several, and relations that need none."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels import universal
from kernels.adamw import launch, reference
from kernels.adamw import problems as p
from kernels.adamw.launch import Batch, Settings
from kernels.problem import Problem, mismatches, to_array
from kernels.property import Property
from kernels.subject import Run, Subject, equal, execute
from kernels.tolerance import Expectation, Verdict, expect

FUNCTIONS = tuple(p.OPERANDS)
STEPS = 4


def _expect(problem: Problem, function: Any) -> list[Expectation]:
    written = p.WRITTEN[problem.function]
    dtypes = [problem.dtype_of(name) for name in written] + [problem.dtype] * len(problem.inputs)
    return expect(
        function, list(problem.inputs.values()), [None] * len(written), problem.dtype, p.result_names(problem.function),
        p.scales(problem), dtypes=dtypes, **problem.parameters,
    )[: len(written)]  # fmt: skip


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about everything that a step writes."""
    return _expect(problem, getattr(reference, problem.function))


def _with(problem: Problem, settings: dict[str, Any] | None = None, /, **inputs: np.ndarray) -> Problem:
    parameters = {**problem.parameters, **(settings or {})}
    return replace(problem, inputs={**problem.inputs, **inputs}, parameters=parameters)


def _run(subject: Subject, problem: Problem) -> list[torch.Tensor]:
    return execute(subject, problem).outputs


def _placed(run: Run, problem: Problem) -> dict[str, Any]:
    return dict(zip(problem.inputs, run.placed))


# ---- what stands in the place of the universal "inputs unchanged": the step is in place


def _in_place(subject: Subject, problem: Problem) -> list[Verdict]:
    """What is returned is what was given, with its dtype; the gradient and all memory between and around are untouched."""
    run = execute(subject, problem)
    placed = _placed(run, problem)
    pairs = [(out, placed[name].tensor) for name, out in zip(p.WRITTEN[problem.function], run.outputs)]
    moved = sum(a.data_ptr() != b.data_ptr() or a.stride() != b.stride() or a.dtype != b.dtype for a, b in pairs)
    outside = placed["g"].untouched()
    for name in p.WRITTEN[problem.function]:
        now, then, held = placed[name].buffer, placed[name].before, placed[name].tensor
        inside = torch.zeros_like(now, dtype=torch.bool)
        inside.as_strided(held.shape, held.stride(), held.storage_offset()).fill_(True)
        outside += mismatches(torch.where(inside, 0, now), torch.where(inside, 0, then))
    return [Verdict("not the given tensors", float(moved), 0.0), Verdict("written outside", float(outside), 0.0)]


def _contract(subject: Subject, problem: Problem) -> list[Verdict]:
    """Shapes and dtypes of what is written."""
    named = zip(p.WRITTEN[problem.function], _run(subject, problem))
    wrong = sum(
        tuple(t.shape) != problem.inputs[n].shape or str(t.dtype) != f"torch.{problem.dtype_of(n)}" for n, t in named
    )
    return [Verdict("shape, dtype", float(wrong), 0.0)]


# ---- agreement


def _trajectory(subject: Subject, problem: Problem) -> list[Verdict]:
    """Several steps with gradients that turn from step to step, from the state that the step before has left."""
    first = problem.parameters["t"]

    def gradients(g: Any, k: int) -> Any:
        return g if k % 2 == 0 else g * -2.0  # twice a number is exact where half of a small one is not

    def steps(*tensors, t, **settings):
        named = dict(zip(problem.inputs, tensors))
        g = named["g"]
        for k in range(STEPS):
            named["g"] = gradients(g, k)
            found = getattr(reference, problem.function)(*named.values(), t=first + k, **settings)
            named |= {name: type(g)(a) for name, a in zip(p.WRITTEN[problem.function], found)}
        return tuple(named[name] for name in p.WRITTEN[problem.function])

    g, current = problem.inputs["g"], problem
    outputs: list[torch.Tensor] = []
    for k in range(STEPS):
        turned = _with(current, {"t": first + k}, g=gradients(g, k))
        outputs = _run(subject, turned)
        current = _with(turned, **{n: to_array(t) for n, t in zip(p.WRITTEN[problem.function], outputs)})
    allowed = [
        replace(e, allowed=STEPS * e.allowed, allowed_rms=STEPS * e.allowed_rms) for e in _expect(problem, steps)
    ]
    return universal.judged(outputs, allowed)


def _any_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    """Other tiles give the same bits, and so does a launch in which the tensor is one of several."""
    outputs = dict(zip(p.WRITTEN[problem.function], _run(subject, problem)))
    copies = [
        {n: torch.from_numpy(a).to(outputs.get(n, outputs["theta"])) for n, a in problem.inputs.items()}
        for _ in range(3)
    ]
    of = {name: [c[name] for c in copies] for name in problem.inputs}
    batch = Batch(of["theta"], of["m"], of["n"], of.get("master", []), [True] * 3, problem.launch)
    batch.read(of["g"])
    s = problem.parameters
    scale = torch.full((1,), s["scale"], device=subject.device)
    launch.step(batch, scale, Settings(*(s[k] for k in ("lr", "beta1", "beta2", "eps", "weight_decay", "t"))))
    return [equal(name, [(out, c[name]) for c in copies]) for name, out in outputs.items()]


# ---- relations


def _rest(subject: Subject, problem: Problem) -> list[Verdict]:
    """No gradient, no moments, no decay: nothing moves."""
    zero = np.zeros_like(problem.inputs["m"])
    problem = _with(problem, {"weight_decay": 0.0}, g=zero, m=zero, n=zero)
    found = zip(p.WRITTEN[problem.function], _run(subject, problem))
    return [Verdict("moved", float(sum(np.sum(to_array(t) != problem.inputs[n]) for n, t in found)), 0.0)]


def _first_step(subject: Subject, problem: Problem) -> list[Verdict]:
    """The first step goes lr against the gradient's sign, however long the gradient."""
    zero = np.zeros_like(problem.inputs["m"])
    problem = _with(problem, {"t": 1, "eps": 1e-30, "weight_decay": 0.0, "scale": 1.0}, m=zero, n=zero)
    weight = problem.inputs.get("master", problem.inputs["theta"])
    found = dict(zip(p.WRITTEN[problem.function], _run(subject, problem)))
    name = "master" if "master" in found else "theta"
    wanted = weight - problem.parameters["lr"] * np.sign(problem.inputs["g"])
    room = {"float32": 2.0**-21, "float16": 2.0**-10, "bfloat16": 2.0**-7}[problem.dtype_of(name)]
    allowed = room * (np.abs(weight) + problem.parameters["lr"])
    return [universal.within(name, to_array(found[name]) - wanted, allowed)]


def _scale_free(subject: Subject, problem: Problem) -> list[Verdict]:
    """Without eps the length of all gradients does not matter: a factor of 4 leaves every bit of the parameters."""
    problem = _with(problem, {"eps": 1e-30})
    g, m, n = (problem.inputs[name] for name in ("g", "m", "n"))
    a, b = _run(subject, problem), _run(subject, _with(problem, g=4 * g, m=4 * m, n=16 * n))
    return [equal("theta", [(a[0], b[0])])]


def _clip_factor(subject: Subject, problem: Problem) -> list[Verdict]:
    """A clip factor of 1/2 undoes a gradient twice as long."""
    a = _run(subject, _with(problem, {"scale": 0.5}, g=2 * problem.inputs["g"]))
    return [equal("all", list(zip(a, _run(subject, _with(problem, {"scale": 1.0})))))]


def _mirror(subject: Subject, problem: Problem) -> list[Verdict]:
    """Another sign of everything but n is another sign of everything but n, bit by bit."""
    turned = {name: -a for name, a in problem.inputs.items() if name != "n"}
    a, b = _run(subject, problem), _run(subject, _with(problem, **turned))
    signs = [1 if name == "n" else -1 for name in p.WRITTEN[problem.function]]
    return [equal("all", [(x + 0.0, sign * y + 0.0) for x, y, sign in zip(a, b, signs)])]


def _rounding(subject: Subject, problem: Problem) -> list[Verdict]:
    """The parameter is the rounding of its master."""
    theta, master, *_ = _run(subject, problem)
    return [equal("theta", [(theta, master.to(theta.dtype))])]


def _drawn(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu)


def _plain(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu, layouts=False)


def _forced(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu, layouts=False, blocks=True)


KEPT = ("reference", "layouts", "deterministic")
PROPERTIES = (
    *(u for u in universal.properties(FUNCTIONS, _drawn, expectations, gradient=False) if u.name in KEPT),
    Property("steps", FUNCTIONS, _plain, _trajectory, share=0.5),
    Property("contract", FUNCTIONS, _drawn, _contract, share=0.25),
    Property("in-place", FUNCTIONS, _drawn, _in_place, ours_only=True, share=0.25),
    Property("any-launch", FUNCTIONS, _forced, _any_launch, ours_only=True, share=0.25),
    Property("at-rest", FUNCTIONS, _plain, _rest, share=0.25),
    Property("first-step", FUNCTIONS, _plain, _first_step, share=0.25),
    Property("scale-free", FUNCTIONS, _plain, _scale_free, share=0.25),
    Property("clip-factor", FUNCTIONS, _plain, _clip_factor, share=0.25),
    Property("mirror", FUNCTIONS, _plain, _mirror, share=0.25),
    Property("rounding", ("adamw_master",), _drawn, _rounding, share=0.25),
)
