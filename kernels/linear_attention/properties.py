r"""What must hold of linear attention: agreement with the reference, and relations that need none.

The reference is the chunked form of `minillm.functional`; that the recurrent and the quadratic form say the same is
tried here too, against our kernels. Causality and the state are held with equal bits where the arithmetic is the same.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from kernels import universal
from kernels.evaluate import evaluate
from kernels.linear_attention import launch, reference
from kernels.linear_attention import problems as p
from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.subject import Run, Subject, equal, execute
from kernels.tolerance import Expectation, Verdict, expect
from kernels.universal import judged, within
from minillm.functional import linear_attention as written
from minillm.functional.feature_maps import elu1_features

MAPPED, ELU = p.FUNCTIONS


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about every output and gradient, in order of `problems.result_names`."""
    names = p.result_names(problem.function)
    return expect(
        getattr(reference, problem.function), list(problem.inputs.values()), list(problem.cotangents.values()),
        problem.dtype, names, p.scales(problem), dtypes=[problem.dtype_of(name) for name in names], **problem.parameters,
    )  # fmt: skip


def _run(subject: Subject, problem: Problem) -> list[torch.Tensor]:
    return execute(subject, problem, gradients=False).outputs


def _with(problem: Problem, **inputs: np.ndarray) -> Problem:
    """The same problem with other values, contiguous."""
    return replace(problem, layouts={}, inputs={**problem.inputs, **inputs})


def _part(problem: Problem, part: slice, **inputs: np.ndarray) -> Problem:
    """Some of the tokens, from the state given."""
    cut = {name: problem.inputs[name][:, :, part] for name in "qkv"}
    cotangents = {**problem.cotangents, "o": problem.cotangents["o"][:, :, part]}
    return replace(_with(problem, **cut, **inputs), cotangents=cotangents)


# ---- against other forms, and with other launches than ours


def _any_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    elu = problem.function == ELU

    class Forced(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, state, normaliser, eps):
            found = launch.forward(q, k, v, state, normaliser, eps, elu, problem.launch)
            ctx.save_for_backward(q, k, v, found[0], *found[3:])
            return found[:3]

        @staticmethod
        def backward(ctx, *arriving):
            do, d_state, d_z = arriving
            q, k, v, o, den, states, z = ctx.saved_tensors
            return *launch.backward(do, d_state, d_z, q, k, v, o, den, states, z, elu, problem.launch), None

    run = execute(replace(subject, functions={problem.function: Forced.apply}), problem)
    return judged(run.outputs + run.gradients, expectations(problem))


def _forms(subject: Subject, problem: Problem) -> list[Verdict]:
    """The recurrent and the quadratic form are the same function."""
    mapped = elu1_features if problem.function == ELU else lambda x: x
    eps, found = problem.parameters["eps"], []
    rules, outputs = expectations(problem), _run(subject, problem)
    recurrent, _ = evaluate(
        lambda q, k, v, s, z: written.linear_attention_recurrent(mapped(q), mapped(k), v, s, z, eps=eps),
        list(problem.inputs.values()), [None] * 3, np.float64,
    )  # fmt: skip
    for x, truth, rule in zip(outputs, recurrent, rules):
        found.append(within(rule.name + " recurrent", np.abs(to_array(x) - truth), rule.allowed))
    nothing = _with(problem, **{name: 0 * problem.inputs[name] for name in ("state", "normaliser")})
    quadratic, _ = evaluate(
        lambda q, k, v: written.linear_attention_quadratic(mapped(q), mapped(k), v, causal=True, eps=eps),
        list(problem.inputs.values())[:3], [None], np.float64,
    )  # fmt: skip
    error = np.abs(to_array(_run(subject, nothing)[0]) - quadratic[0])
    return [*found, within("o quadratic", error, expectations(nothing)[0].allowed)]


# ---- relations


def _passing(subject: Subject, problem: Problem) -> list[Verdict]:
    """A sequence cut anywhere, the state passed on, is the whole: outputs, states, and gradients through the state."""
    L = problem.inputs["q"].shape[2]
    cut = int(np.random.default_rng(L).integers(0, L + 1))
    whole = execute(subject, replace(problem, layouts={}))
    first = _part(problem, slice(cut))
    left = _run(subject, first)
    second = _part(problem, slice(cut, None), state=to_array(left[1]), normaliser=to_array(left[2]))
    rules, own = expectations(problem), expectations(second)
    right = execute(subject, second)
    o = np.concatenate([to_array(left[0]), to_array(right.outputs[0])], axis=2)
    found = [within("o", np.abs(to_array(whole.outputs[0]) - o), 3 * rules[0].allowed)]
    for n in (1, 2):
        error = np.abs(to_array(whole.outputs[n]) - to_array(right.outputs[n]))
        found.append(within(rules[n].name, error, 2 * rules[n].allowed + own[n].allowed))
    if right.gradients[3] is None or not cut or cut == L:
        return found
    passed = {"last": to_array(right.gradients[3]), "last_z": to_array(right.gradients[4])}
    back = execute(subject, replace(first, cotangents={**first.cotangents, **passed}))
    for n in (3, 4):
        error = np.abs(to_array(whole.gradients[n]) - to_array(back.gradients[n]))
        found.append(within(rules[3 + n].name, error, 3 * rules[3 + n].allowed))
    return found


def _causality(subject: Subject, problem: Problem) -> list[Verdict]:
    """Later tokens change no bit of earlier outputs, and get no gradient from them."""
    L = problem.inputs["q"].shape[2]
    at = L // 2
    later = {name: problem.inputs[name].copy() for name in "qkv"}
    for array in later.values():
        array[:, :, at:] = 1.0
    a, b = _run(subject, _with(problem)), _run(subject, _with(problem, **later))
    found = [equal("earlier outputs", [(a[0][:, :, :at], b[0][:, :, :at])])]
    seeds = {name: np.zeros_like(c) for name, c in problem.cotangents.items()}
    seeds["o"][:, :, :at] = problem.cotangents["o"][:, :, :at]
    run = execute(subject, replace(_with(problem), cotangents=seeds))
    if run.gradients[0] is not None:
        wrong = sum(int((g[:, :, at:] != 0).sum()) for g in run.gradients[:3])
        found.append(Verdict("gradients of later tokens", wrong, 0.0))
    return found


def _linear(subject: Subject, problem: Problem) -> list[Verdict]:
    """Linear in values and state together: twice of both is twice the output, bit by bit; sums add."""
    v, s = np.round(np.clip(problem.inputs["v"], -2, 2)), np.round(problem.inputs["state"])
    cases = [_with(problem, v=x, state=y) for x, y in ((v, s), (v[..., ::-1].copy(), s[..., ::-1].copy()),
                                                     (v + v[..., ::-1], s + s[..., ::-1]))]  # fmt: skip
    a, b, c = (to_array(_run(subject, case)[0]) for case in cases)
    allowed = sum(expectations(case)[0].allowed for case in cases)
    double = _run(subject, _with(problem, v=2 * v, state=2 * s))[0]
    single = _run(subject, cases[0])[0]
    normal = single.abs() > 2.0**-12
    return [within("o of the sum", np.abs(c - a - b), allowed),
            equal("o of twice", [(double[normal] + 0.0, 2 * single[normal] + 0.0)])]  # fmt: skip


def _constant(subject: Subject, problem: Problem) -> list[Verdict]:
    """Equal values, and a state made of such, come out as they are (eps = 0)."""
    z = problem.inputs["normaliser"]
    ones = _with(
        problem, v=np.ones_like(problem.inputs["v"]), state=np.repeat(z[..., None], problem.inputs["v"].shape[3], -1)
    )
    ones = replace(ones, parameters={"eps": 0.0})
    o = to_array(_run(subject, ones)[0])
    return [within("o", np.abs(o - 1), expectations(ones)[0].allowed)]


def _alone(subject: Subject, problem: Problem) -> list[Verdict]:
    """A sequence does not see the others."""
    other = {name: np.concatenate([a[:1], 0.5 * a[1:] + 0.25]) for name, a in problem.inputs.items()}
    a, b = execute(subject, _with(problem)), execute(subject, _with(problem, **other))
    return [equal("the first sequence", [(x[:1], y[:1]) for x, y in zip(a.results, b.results)])]


def _long(subject: Subject, problem: Problem) -> list[Verdict]:
    """Sums beyond the range of float16 neither overflow nor lose accuracy: state and products are large, o is not."""
    big = {name: 200.0 + 0 * problem.inputs[name] for name in "qk"}
    state = {"state": 1e5 * problem.inputs["state"], "normaliser": 1e5 * problem.inputs["normaliser"]}
    case = _with(problem, **big, **state)
    run: Run = execute(subject, case)
    rules = expectations(case)
    single = (1, 2)  # states are float32
    inside = [n for n, rule in enumerate(rules) if n in single or np.abs(rule.truth).max(initial=0.0) < 6e4]
    tensors, wanted = [*run.outputs, *run.gradients], []
    infinite = 0
    for n in inside:
        if tensors[n] is not None:
            infinite += int((~torch.isfinite(tensors[n])).sum())
            wanted.append((tensors[n], rules[n]))
    return [Verdict("not finite", infinite, 0.0), *judged([t for t, _ in wanted], [r for _, r in wanted])]


def _empty(subject: Subject, problem: Problem) -> list[Verdict]:
    """No tokens: the state passes through, values and gradients. No sequences: empty results."""
    nothing = _part(problem, slice(0, 0))
    run = execute(subject, nothing)
    expected = [torch.from_numpy(problem.inputs[n]).to(run.outputs[1]) for n in ("state", "normaliser")]
    found = [equal("state", list(zip(run.outputs[1:], expected)))]
    if run.gradients[3] is not None:
        seeds = [torch.from_numpy(problem.cotangents[n]).to(run.outputs[1]) for n in ("last", "last_z")]
        found.append(equal("gradient of the state", list(zip(run.gradients[3:], seeds))))
    none = _with(problem, **{name: a[:0] for name, a in problem.inputs.items()})
    run = execute(subject, replace(none, cotangents={n: c[:0] for n, c in problem.cotangents.items()}))
    wrong = sum(t.numel() for t in run.results)
    return [*found, Verdict("elements of no sequences", wrong, 0.0)]


def _draw(**options) -> Callable:
    return lambda function, dtype, gpu: p.problems(function, dtype, gpu, **options)


SMOOTH = _draw(layouts=False, smooth=True)

PROPERTIES = (
    *universal.properties(p.FUNCTIONS, _draw(), expectations),
    Property("any-launch", p.FUNCTIONS, _draw(launches=True), _any_launch, ours_only=True, gradient=True, share=0.5),
    Property("forms", p.FUNCTIONS, SMOOTH, _forms, share=0.25),
    Property("state-passes", p.FUNCTIONS, SMOOTH, _passing, share=0.25),
    Property("causality", p.FUNCTIONS, SMOOTH, _causality, share=0.25),
    Property("linear-in-values", p.FUNCTIONS, SMOOTH, _linear, share=0.25),
    Property("equal-values", (MAPPED,), SMOOTH, _constant, share=0.25),
    Property("sequences-alone", (MAPPED,), SMOOTH, _alone, share=0.25),
    Property("large-sums", (MAPPED,), SMOOTH, _long, share=0.25),
    Property("empty", p.FUNCTIONS, SMOOTH, _empty, share=0.0),
)
