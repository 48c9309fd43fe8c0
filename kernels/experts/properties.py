r"""What must hold of the experts: agreement with the reference, and relations that need none.

Numbers (choices, counts, places) are compared for equality. Relations between floats ask for equal bits where the
arithmetic is the same (other tokens' values, a capacity that nobody reaches, a factor of two) and inherit the
allowance of `kernels.tolerance` where rows may lie at other places of a tile.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from kernels import universal
from kernels.experts import forced, launch, reference
from kernels.experts import problems as p
from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.subject import Run, Subject, equal, execute
from kernels.tolerance import Expectation, Verdict, expect
from kernels.universal import changed, judged, within

LAYER, GROUPED, ROUTE, PACK = ("mixture_of_experts",), ("grouped_linear",), ("route",), ("pack",)


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about every output and gradient, in order of `problems.result_names`."""
    return expect(
        getattr(reference, problem.function),
        list(problem.inputs.values()), list(problem.cotangents.values()), problem.dtype,
        p.result_names(problem.function), p.scales(problem),
        constants=list(problem.constants.values()), dtypes=p.result_dtypes(problem), **problem.parameters,
    )  # fmt: skip


def _with(problem: Problem, **constants) -> Problem:
    return replace(problem, constants={**problem.constants, **constants})


def _run(subject: Subject, problem: Problem) -> Run:
    return execute(subject, problem, gradients=False)


def _count(name: str, wrong) -> Verdict:
    return Verdict(name, int(np.sum(wrong)), 0.0)


def _served(problem: Problem) -> np.ndarray:
    """Which assignments (N, k) name an expert."""
    experts = problem.constants["experts"]
    return (experts >= 0) & (experts < _n_experts(problem))


def _n_experts(problem: Problem) -> int:
    return problem.parameters.get("n_experts") or len(problem.inputs["w_in"])


# ---- other launches than ours


def _any_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    functions = forced.functions(problem.launch)
    run = execute(replace(subject, functions=functions), problem)
    return judged(run.outputs + run.gradients, expectations(problem))


# ---- the router


def _gates(subject: Subject, problem: Problem) -> list[Verdict]:
    """Gates are not negative; they sum to 1 when renormalised, and with softmax to at most 1 in any case."""
    gates = to_array(_run(subject, problem).outputs[0])
    total, slack = gates.sum(-1), 1e-5
    verdicts = [_count("negative", gates < 0)]
    if problem.parameters["renormalise"]:
        verdicts.append(within("sum - 1", np.abs(total - 1), slack))
    elif problem.parameters["scoring"] == "softmax":
        verdicts.append(_count("sum above 1", total > 1 + slack))
    return verdicts


def _choice(subject: Subject, problem: Problem) -> list[Verdict]:
    """k different experts; nobody outside has a larger score, or an equal one and a lower number than a chosen one."""
    experts = to_array(_run(subject, problem).outputs[1]).astype(int)
    logits, bias = problem.inputs["logits"], problem.constants["bias"]
    score = logits
    if bias is not None:
        e = np.exp(logits - logits.max(-1, keepdims=True, initial=-1e9))
        score = (
            1 / (1 + np.exp(-logits)) if problem.parameters["scoring"] == "sigmoid" else e / e.sum(-1, keepdims=True)
        ) + bias
    wrong = 0
    for row, mine in zip(score, experts):
        wrong += len(set(mine)) != len(mine) or not all(0 <= e < len(row) for e in mine)
        order = sorted(range(len(row)), key=lambda e: (-row[e], e))
        wrong += list(mine) != order[: len(mine)]
    return [_count("wrong rows", wrong)]


def _shift(subject: Subject, problem: Problem) -> list[Verdict]:
    """Adding a number to all logits of a token changes neither choice nor gates of the softmax."""
    problem = changed(replace(problem, parameters={**problem.parameters, "scoring": "softmax"}),
                      logits=np.round(4 * problem.inputs["logits"]) / 4)  # fmt: skip
    a, b = (_run(subject, q) for q in (problem, changed(problem, logits=problem.inputs["logits"] + 2.0)))
    gap = np.abs(to_array(a.outputs[0]) - to_array(b.outputs[0]))
    return [equal("experts", [(a.outputs[1], b.outputs[1])]), within("gates", gap, 1e-6)]


def _bias(subject: Subject, problem: Problem) -> list[Verdict]:
    """The bias changes the choice alone: the gates are those of the chosen scores; the same bias for all changes nothing."""
    logits = problem.inputs["logits"]
    E = logits.shape[1]
    plain = replace(problem, parameters={**problem.parameters, "renormalise": False})
    every = replace(_with(plain, bias=None), parameters={**plain.parameters, "k": E},
                    cotangents={**plain.cotangents, "gates": np.zeros(logits.shape)})  # fmt: skip
    chosen, scores = _run(subject, plain), _run(subject, every)
    by_expert = np.zeros(logits.shape)
    np.put_along_axis(by_expert, to_array(scores.outputs[1]).astype(int), to_array(scores.outputs[0]), -1)
    wanted = np.take_along_axis(by_expert, to_array(chosen.outputs[1]).astype(int), -1)
    same = [_run(subject, _with(problem, bias=b)) for b in (np.full(E, 0.5, np.float32), np.zeros(E, np.float32))]
    return [
        equal("gates", [(chosen.outputs[0].double(), torch.from_numpy(wanted).to(chosen.outputs[0].device))]),
        equal("same bias for all", list(zip(same[0].outputs[:2], same[1].outputs[:2]))),
    ]


def _balance(subject: Subject, problem: Problem) -> list[Verdict]:
    """Loads sum to N k; equal scores give an auxiliary loss of 1, everything at one expert E, and z is not negative."""
    run = _run(subject, problem)
    (N, E), k = problem.inputs["logits"].shape, problem.parameters["k"]
    flat = _run(subject, changed(problem, logits=np.zeros((N, E))))
    peaked = np.zeros((N, E))
    peaked[:, E // 2] = 40.0
    one = replace(_with(problem, bias=None), parameters={"k": 1, "scoring": "softmax", "renormalise": True},
                  cotangents={**problem.cotangents, "gates": np.zeros((N, 1))})  # fmt: skip
    most = _run(subject, changed(one, logits=peaked))
    some = float(N > 0)
    return [
        _count("lost", int(run.outputs[2].sum()) - N * k),
        within("aux of equal scores", np.abs(to_array(flat.outputs[3])[None] - some), 1e-5),
        within("aux of one expert", np.abs(to_array(most.outputs[3])[None] - some * E), 1e-5 * E),
        _count("z below 0", to_array(run.outputs[4]) < 0),
    ]


# ---- the packing


def _conserved(subject: Subject, problem: Problem) -> list[Verdict]:
    """Every served assignment lies in its own expert's rows, once; nothing else does; places and order are inverse."""
    order, places, offsets = (to_array(t).astype(int) for t in _run(subject, problem).outputs)
    experts, E = problem.constants["experts"], _n_experts(problem)
    limit = problem.parameters["capacity"]
    wanted = np.bincount(experts[_served(problem)].astype(int), minlength=E)
    loads = np.diff(offsets)
    flat = places.reshape(-1)
    there = np.flatnonzero(flat >= 0)
    wrong = [
        _count("loads", loads != (wanted if limit is None else np.minimum(wanted, limit))),
        _count("first offset", offsets[0] != 0),
        _count("served", abs(len(there) - offsets[-1]) + abs(int((order >= 0).sum()) - offsets[-1])),
    ]
    if wrong[-1].passed and (flat < offsets[-1]).all():
        home = np.searchsorted(offsets, flat[there], side="right") - 1
        wrong.append(_count("inverse", order[flat[there]] != there))
        wrong.append(_count("at another expert", home != experts.reshape(-1)[there]))
    return wrong


def _stable(subject: Subject, problem: Problem) -> list[Verdict]:
    """Within an expert tokens keep their order, and with a capacity the first ones are served."""
    order, places, offsets = (to_array(t).astype(int) for t in _run(subject, problem).outputs)
    wrong = sum(int((np.diff(order[a:b]) <= 0).sum()) for a, b in zip(offsets, offsets[1:]))
    experts = problem.constants["experts"]
    late = 0
    for e in range(_n_experts(problem)):
        served = np.greater_equal(places, 0)[np.equal(experts, e)]
        late += int((np.diff(served.astype(int)) > 0).sum())
    return [_count("out of order", wrong), _count("served before an earlier one", late)]


# ---- the products


def _additive(subject: Subject, problem: Problem) -> list[Verdict]:
    """The inner axis may be cut anywhere: the parts' products add up, exactly on integers."""
    x, w = np.round(problem.inputs["x"]), np.round(problem.inputs["w"])
    cut = x.shape[1] // 2

    def y(a: np.ndarray, b: np.ndarray) -> torch.Tensor:
        return _run(subject, changed(problem, x=a, w=b)).outputs[0]

    parts = y(x[:, cut:], w[:, :, cut:]).float()
    if cut:
        parts = parts + y(x[:, :cut], w[:, :, :cut]).float()
    whole = y(x, w).float()
    small = parts.abs() < 1024  # exact in float16
    return [equal("y", [((whole + 0.0)[small], (parts + 0.0)[small])])]


# ---- the layer


def _allowed(problem: Problem) -> np.ndarray:
    return expectations(problem)[0].allowed


def _relabelled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Other numbers for the same experts, and another order of the tokens, change nothing else."""
    i, experts = problem.inputs, problem.constants["experts"]
    rng = np.random.default_rng(len(experts))
    name, token = rng.permutation(_n_experts(problem)), rng.permutation(len(experts))
    old = np.argsort(name)
    renamed = np.where(_served(problem), name[np.where(_served(problem), experts, 0)], -1).astype(experts.dtype)
    plain = replace(problem, parameters={"capacity": None}, layouts={})
    y = to_array(_run(subject, plain).outputs[0])
    other = changed(_with(plain, experts=renamed), w_in=i["w_in"][old], w_down=i["w_down"][old])
    moved = changed(_with(plain, experts=experts[token]), x=i["x"][token], gates=i["gates"][token])
    allowed = 2 * _allowed(plain)
    return [
        within("experts", np.abs(to_array(_run(subject, other).outputs[0]) - y), allowed),
        within("tokens", np.abs(to_array(_run(subject, moved).outputs[0]) - y[token]), allowed[token]),
    ]


def _equal_experts(subject: Subject, problem: Problem) -> list[Verdict]:
    """Experts that are all the same are one network, times the sum of the gates."""
    i = problem.inputs
    same = {name: np.broadcast_to(i[name][:1], i[name].shape).copy() for name in ("w_in", "w_down")}
    every = replace(problem, parameters={"capacity": None}, layouts={})
    many = changed(every, w_in=same["w_in"], w_down=same["w_down"])
    served = np.where(_served(problem), i["gates"], 0.0)
    one = changed(
        _with(every, experts=np.zeros((len(served), 1), np.int64)), gates=served.sum(-1, keepdims=True),
        w_in=i["w_in"][:1], w_down=i["w_down"][:1],
    )  # fmt: skip
    a, b = (to_array(_run(subject, q).outputs[0]) for q in (many, one))
    return [within("y", np.abs(a - b), 2 * (_allowed(many) + _allowed(one)))]


def _alone(subject: Subject, problem: Problem) -> list[Verdict]:
    """A token's output depends on itself: other tokens' values, NaN included, change not one bit of it."""
    if len(problem.inputs["x"]) < 2:
        return []
    x = problem.inputs["x"].copy()
    x[1:] = np.where(np.arange(x.shape[1]) % 2, np.nan, -3.0)
    a, b = (
        _run(subject, q).outputs[0][0]
        for q in (replace(problem, layouts={}), changed(replace(problem, layouts={}), x=x))
    )
    return [equal("the first token", [(a, b)])]


def _unserved(subject: Subject, problem: Problem) -> list[Verdict]:
    """A token without an expert gets zeros, whatever it holds, and its gradients are zeros."""
    padding = np.logical_not(_served(problem).any(-1, keepdims=True))  # (N, 1)
    x = np.where(padding, np.nan, problem.inputs["x"])
    run = execute(subject, changed(replace(problem, layouts={}), x=x))
    pairs = [run.outputs[0], *(g for g in run.gradients[:2] if g is not None)]
    mask = torch.from_numpy(padding[:, 0])
    wrong = sum(int((t.cpu()[mask] != 0).sum()) for t in pairs)
    infinite = sum(int((~torch.isfinite(t)).sum()) for t in run.results)
    return [_count("not zero", wrong), _count("not finite", infinite)]


def _capacity(subject: Subject, problem: Problem) -> list[Verdict]:
    """A capacity that nobody reaches changes not one bit; what a capacity drops is as if its gate were 0."""
    experts, limit = problem.constants["experts"], problem.parameters["capacity"] or 1
    plain = replace(problem, parameters={"capacity": None}, layouts={})
    roomy = replace(plain, parameters={"capacity": max(len(experts), 1)})
    rank = np.zeros(experts.shape, int)
    for e in range(_n_experts(problem)):
        hit = np.equal(experts, e)
        rank[hit] = np.arange(hit.sum())
    muted = changed(plain, gates=np.where(rank < limit, problem.inputs["gates"], 0.0))
    tight = replace(plain, parameters={"capacity": limit})
    a, b = execute(subject, plain), execute(subject, roomy)
    c, d = (to_array(_run(subject, q).outputs[0]) for q in (tight, muted))
    return [equal("roomy", list(zip(a.results, b.results))), within("tight", np.abs(c - d), 2 * _allowed(muted))]


def _linear_in_gates(subject: Subject, problem: Problem) -> list[Verdict]:
    """Twice the gates, twice the output, bit by bit; and y is the sum over slots of each gate alone."""
    i = problem.inputs
    plain = replace(problem, layouts={})
    one = _run(subject, plain).outputs[0]
    double = _run(subject, changed(plain, gates=2 * i["gates"])).outputs[0]
    normal = one.abs() > 2.0**-12  # below, float16 has lost bits that the doubled value still has
    total = np.zeros(i["x"].shape)
    for slot in range(i["gates"].shape[1]):
        alone = np.where(np.arange(i["gates"].shape[1]) == slot, i["gates"], 0.0)
        total += to_array(_run(subject, changed(plain, gates=alone)).outputs[0])
    return [
        equal("doubled", [((double + 0.0)[normal], (2 * one + 0.0)[normal])]),
        within("by slots", np.abs(total - to_array(one)), (1 + i["gates"].shape[1]) * _allowed(plain)),
    ]


def _gate_gradient(subject: Subject, problem: Problem) -> list[Verdict]:
    """The gate's gradient is <dy, expert's output>; an expert without tokens has a weight gradient of exactly 0."""
    i, plain = problem.inputs, replace(problem, layouts={})
    run = execute(subject, plain)
    assert run.gradients[1] is not None
    dgates, bound = to_array(run.gradients[1]), expectations(plain)[2].allowed
    dy, slots = problem.cotangents["y"], i["gates"].shape[1]
    direct = np.zeros(dgates.shape)
    slack = np.zeros(dgates.shape)
    for slot in range(slots):
        unit = changed(plain, gates=np.where(np.arange(slots) == slot, np.ones_like(i["gates"]), 0.0))
        direct[:, slot] = (to_array(_run(subject, unit).outputs[0]) * dy).sum(-1)
        slack[:, slot] = (_allowed(unit) * np.abs(dy)).sum(-1)
    order, places, offsets = reference.pack(
        problem.constants["experts"], _n_experts(problem), problem.parameters["capacity"]
    )
    idle = torch.from_numpy(np.diff(offsets) == 0)
    wrong = sum(int((g.cpu()[idle] != 0).sum()) for g in run.gradients[2:])
    return [within("dgates", np.abs(dgates - direct), 2 * bound + slack), _count("gradient of idle experts", wrong)]


def _identity(subject: Subject, problem: Problem) -> list[Verdict]:
    """Packing rows and collecting them again, with weights 1 / k for k a power of two, gives the tokens back."""
    experts = torch.from_numpy(problem.constants["experts"]).to(subject.device)
    N, k = experts.shape
    order, places, _ = launch.pack(experts, _n_experts(problem), None)
    served = torch.from_numpy(_served(problem)).to(subject.device)
    x = torch.arange(N * 5, device=subject.device, dtype=torch.float32).reshape(N, 5) % 512
    rows = torch.where(order[:, None] >= 0, x[(order.clamp(min=0) // k).long()], torch.nan)
    z = launch.combine(rows, places, torch.ones((N, k), device=subject.device))
    return [equal("z", [(z + 0.0, x * served.sum(-1, keepdim=True) + 0.0)])]


SMOOTH = ("normal",)


def _draw(**options) -> Callable:
    return lambda function, dtype, gpu: p.problems(function, dtype, gpu, **options)


BY_VALUE = universal.properties(p.FUNCTIONS, _draw(), expectations)[:2]
THE_REST = universal.properties(p.FUNCTIONS, _draw(kinds=SMOOTH), expectations)[2:]
RELATION = _draw(kinds=SMOOTH, layouts=False)

PROPERTIES = (
    *BY_VALUE,
    Property("any-launch", p.FUNCTIONS, _draw(launches=True), _any_launch, ours_only=True, share=0.5),
    *THE_REST,
    Property("gates-sum", ROUTE, RELATION, _gates, share=0.25),
    Property("k-largest", ROUTE, _draw(layouts=False, kinds=("integers", "normal", "equal")), _choice, share=0.5),
    Property("shift-invariance", ROUTE, RELATION, _shift, share=0.25),
    Property("bias-chooses-only", ROUTE, RELATION, _bias, share=0.25),
    Property("balance", ROUTE, RELATION, _balance, share=0.25),
    Property("conservation", PACK, RELATION, _conserved, share=0.5),
    Property("stable", PACK, RELATION, _stable, share=0.25),
    Property("additive", GROUPED, _draw(kinds=("integers",), layouts=False), _additive, share=0.25),
    Property("relabelling", LAYER, RELATION, _relabelled, share=0.25),
    Property("equal-experts", LAYER, RELATION, _equal_experts, share=0.25),
    Property("token-alone", LAYER, _draw(kinds=SMOOTH, layouts=False, capacities=False), _alone, share=0.25),
    Property(
        "unserved", LAYER, _draw(kinds=SMOOTH, layouts=False, routings=("not all served",)), _unserved, share=0.25
    ),
    Property("capacity", LAYER, RELATION, _capacity, share=0.25),
    Property("linear-in-gates", LAYER, RELATION, _linear_in_gates, share=0.25),
    Property("gate-gradient", LAYER, RELATION, _gate_gradient, share=0.25, gradient=True),
    Property("pack-and-collect", PACK, RELATION, _identity, share=0.25, ours_only=True),
)
