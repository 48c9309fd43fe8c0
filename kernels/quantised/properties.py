"""What must hold of products with quantised weights: agreement with the reference, and relations that need none."""

from dataclasses import replace

import numpy as np
import torch

from kernels import universal
from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.quantised import launch, reference
from kernels.quantised import problems as p
from kernels.quantised.launch import Weight
from kernels.subject import Subject, equal, execute, placed_operands
from kernels.tolerance import Expectation, Verdict, expect, judge
from minillm.functional import nf4, quantisation


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about y and dx, with W as the contract rounds it."""
    return expect(
        reference.product, list(problem.inputs.values()), list(problem.cotangents.values()), problem.dtype,
        p.result_names(problem.function), p.scales(problem), constants=[p.weights(problem)],
    )  # fmt: skip


def _y(subject: Subject, problem: Problem) -> torch.Tensor:
    return execute(subject, problem, gradients=False).outputs[0]


def _constants(problem: Problem, **constants: np.ndarray) -> Problem:
    return replace(problem, constants={**problem.constants, **constants})


def _unit_rows(problem: Problem) -> Problem:
    k, n = problem.inputs["x"].shape[-1], problem.cotangents["y"].shape[-1]
    return replace(problem, inputs={"x": np.eye(k)}, cotangents={"y": np.ones((k, n))})


def _weight(subject: Subject, problem: Problem) -> Weight:
    """The problem's weight on the subject's device."""
    _, placed = placed_operands(subject, problem)
    tensors = [c.tensor for c in placed if c is not None]
    n, k = problem.cotangents["y"].shape[-1], problem.inputs["x"].shape[-1]
    meta = tensors[2] if len(tensors) == 3 else None
    s = problem.parameters
    kind = problem.function.removesuffix("_linear")
    return Weight(kind, tensors[0], tensors[1], meta, s.get("mean", 0.0), n, k, s.get("block", 64))


def _any_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    """Other tiles stay within the rule, in both directions."""
    run, weight = execute(subject, problem), _weight(subject, problem)
    x, dy = (torch.from_numpy(a).to(run.outputs[0]) for a in (problem.inputs["x"], problem.cotangents["y"]))
    found = [launch.product(x, weight, tile=problem.launch), launch.product(dy, weight, True, problem.launch)]
    return universal.judged(found, expectations(problem))


def _dequantises(subject: Subject, problem: Problem) -> list[Verdict]:
    """Unit rows bring out W itself, level by level: the codes' values are fixed points of the way there and back."""
    found = to_array(_y(subject, _unit_rows(problem))).T
    wanted = p.weights(problem)
    room = 2.0**-22 if problem.dtype == "float32" else 2.0**-10 if problem.dtype == "float16" else 2.0**-7
    return [judge(found, Expectation("W", wanted, np.abs(wanted).max(initial=0) * np.asarray(room), np.inf))]


def _round_trip(subject: Subject, problem: Problem) -> list[Verdict]:
    """What was quantised comes back within half a step (int8), or half the widest gap of levels (NF4)."""
    n, k = problem.cotangents["y"].shape[-1], problem.inputs["x"].shape[-1]
    w = np.random.default_rng(n + 64 * k).standard_normal((n, k)).astype(np.float32)
    if problem.function == "int8_linear":
        codes, scale = quantisation.quantise_int8(w, -1)
        problem, half = _constants(problem, codes=codes, scale=scale), scale / 2
    else:
        block = problem.parameters["block"]
        packed, scale, _, _ = nf4.quantise_nf4(w, block)
        problem = _constants(problem, packed=packed, scale=scale)
        gap = np.diff(nf4.nf4_levels()).max() / 2
        half = gap * np.repeat(scale, block)[: n * k].reshape(n, k)
    error = to_array(_y(subject, _unit_rows(problem))).T - w
    room = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}[problem.dtype] * np.abs(w).max()
    return [universal.within("W", error, half + room)]


def _scaled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Scales times four are results times four, bit for bit."""
    large = {"meta": 4} if problem.function == "nf4_double_linear" else {"scale": 4}
    more = {name: (problem.constants[name] * factor).astype(np.float32) for name, factor in large.items()}
    changed = _constants(problem, **more)
    if "mean" in problem.parameters:
        changed = replace(changed, parameters={**problem.parameters, "mean": 4 * problem.parameters["mean"]})
    a, b = execute(subject, problem), execute(subject, changed)
    return [equal("all results", [(4 * x, y) for x, y in zip(a.results, b.results)])]


def _own_row(subject: Subject, problem: Problem) -> list[Verdict]:
    """Another last row of codes leaves every other output alone, bit for bit."""
    codes = problem.constants["codes"].copy()
    codes[-1] = -codes[-1]
    a, b = _y(subject, problem), _y(subject, _constants(problem, codes=codes))
    return [equal("y", [(a[..., :-1], b[..., :-1])])]


def _own_block(subject: Subject, problem: Problem) -> list[Verdict]:
    """A block whose scale is 0 is a block of zeros, and the others do not notice."""
    scale = problem.constants["scale"].copy()
    scale[-1] = 0
    changed = _constants(problem, scale=scale)
    found = to_array(_y(subject, _unit_rows(changed))).T.reshape(-1)
    before = to_array(_y(subject, _unit_rows(problem))).T.reshape(-1)
    start = (len(scale) - 1) * problem.parameters["block"]
    return [Verdict("changed", float(np.sum(found[:start] != before[:start]) + np.count_nonzero(found[start:])), 0.0)]


def _double_is_single(subject: Subject, problem: Problem) -> list[Verdict]:
    """Scales that are quantised too give what their values give as scales."""
    c, s = problem.constants, problem.parameters
    n, k = problem.cotangents["y"].shape[-1], problem.inputs["x"].shape[-1]
    blocks = -(-n * k // s["block"])
    scale = nf4.dequantise_scales(
        nf4.QuantisedScales(quantisation.Quantised(c["scale"], c["meta"]), s["mean"], blocks)
    )  # fmt: skip
    single = replace(
        problem, function="nf4_linear", constants={"packed": c["packed"], "scale": scale},
        parameters={"n_out": n, "block": s["block"]},
    )  # fmt: skip
    return [judge(to_array(_y(subject, problem)), replace(e, truth=to_array(_y(subject, single))))
            for e in expectations(problem)[:1]]  # fmt: skip


def _mirror(subject: Subject, problem: Problem) -> list[Verdict]:
    """Another sign of x is another sign of y, bit by bit."""
    turned = replace(problem, inputs={"x": -problem.inputs["x"]})
    return [equal("y", [(_y(subject, turned) + 0.0, -_y(subject, problem) + 0.0)])]


def _drawn(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu)


def _plain(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu, layouts=False)


def _forced(function: str, dtype: str, gpu: bool):
    return p.problems(function, dtype, gpu, layouts=False, launches=True)


PROPERTIES = (
    *universal.properties(p.FUNCTIONS, _drawn, expectations),
    Property("any-launch", p.FUNCTIONS, _forced, _any_launch, gradient=True, ours_only=True, share=0.5),
    Property("dequantises", p.FUNCTIONS, _plain, _dequantises, share=0.25),
    Property("round-trip", p.FUNCTIONS[:2], _plain, _round_trip, share=0.25),
    Property("scaled", p.FUNCTIONS, _plain, _scaled, share=0.25),
    Property("own-row", p.FUNCTIONS[:1], _plain, _own_row, share=0.25),
    Property("own-block", ("nf4_linear",), _plain, _own_block, share=0.25),
    Property("double-is-single", ("nf4_double_linear",), _plain, _double_is_single, ours_only=True, share=0.25),
    Property("mirror", p.FUNCTIONS, _plain, _mirror, share=0.25),
)
