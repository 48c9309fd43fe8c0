r"""What must hold of attention: agreement with the reference, and relations that need none.

Relations inherit their allowances from the rule of the comparison itself (`kernels.tolerance`), or ask for equal bits
where no arithmetic differs: what a mask hides, another order of heads, a power of two.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels import universal
from kernels.attention import launch, reference
from kernels.attention import problems as p
from kernels.attention.launch import Pattern
from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.subject import Run, Subject, equal, execute
from kernels.tolerance import Expectation, Verdict, expect
from kernels.universal import changed, judged, within


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about every output and gradient, in order of `problems.result_names`."""
    names = p.result_names(problem.function)
    return expect(
        getattr(reference, problem.function), list(problem.inputs.values()), list(problem.cotangents.values()),
        problem.dtype, names, p.scales(problem), constants=list(problem.constants.values()),
        dtypes=[problem.dtype_of(name) for name in names], **problem.parameters,
    )  # fmt: skip


def _with(problem: Problem, **parameters: Any) -> Problem:
    return replace(problem, parameters={**problem.parameters, **parameters})


def _constant(problem: Problem, **constants: Any) -> Problem:
    return replace(problem, constants={**problem.constants, **constants})


def _given(problem: Problem, inputs: dict[str, np.ndarray]) -> Problem:
    return replace(problem, inputs={**problem.inputs, **inputs})


def _run(subject: Subject, problem: Problem, gradients: bool = False) -> Run:
    return execute(subject, problem, gradients=gradients)


def _o(subject: Subject, problem: Problem) -> torch.Tensor:
    return execute(subject, problem, gradients=False).outputs[0]


def _near(name: str, a: torch.Tensor, b: torch.Tensor, *rules: Expectation) -> Verdict:
    """Two results that may differ by what the rule allows each of them."""
    return within(name, np.abs(to_array(a) - to_array(b)), sum(rule.allowed for rule in rules))


# ---- launches


def any_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    """Other tiles give results within the rule, forward and backward."""
    c, how = problem.constants, problem.parameters

    def function(*operands: Any) -> Any:
        q, k, v = operands[:3]

        def numbers(name: str) -> Any:
            return None if c.get(name) is None else torch.from_numpy(c[name].astype(np.int32)).to(q.device)

        starts = (numbers("starts_q"), numbers("starts_k")) if "starts_q" in c else None
        pattern = Pattern(
            how["causal"], how["window"] or 0, how["align"], numbers("key_lengths"), numbers("prefix"), starts  # type: ignore[arg-type]
        )  # fmt: skip
        scale = q.shape[-1] ** -0.5 if how["scale"] is None else how["scale"]

        class Forced(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *tensors):
                a, b, c = ctx.operands = tensors
                ctx.found = launch.forward(a, b, c, pattern, scale, how["softcap"], problem.launch.forward)
                return ctx.found

            @staticmethod
            def backward(ctx, do, dlse):
                (a, b, c), (o, lse) = ctx.operands, ctx.found
                return launch.backward(
                    do, dlse, a, b, c, o, lse, pattern, scale, how["softcap"], problem.launch
                )  # fmt: skip

        if starts is not None:
            o, _ = Forced.apply(*(t.unsqueeze(0).transpose(1, 2) for t in (q, k, v)))  # type: ignore[misc]
            return o.transpose(1, 2)[0]
        found: Any = Forced.apply(q, k, v)
        return found if len(problem.cotangents) == 2 else found[0]

    run = execute(replace(subject, functions={problem.function: function}), problem)
    return judged(run.outputs + run.gradients, expectations(problem))


# ---- what is hidden


def hidden(subject: Subject, problem: Problem) -> list[Verdict]:
    """What a query may not see has no effect on it: not one bit of its output, and its gradient there is 0.

    The first half of the queries is looked at, and all keys change that none of them sees.
    """
    L_q = problem.inputs["q"].shape[2]
    half = (L_q + 1) // 2
    unseen = ~p.dense(problem).keep[:, :, :half].any((1, 2))  # (B, L_k)
    noise = np.random.default_rng(0)
    other = {
        name: np.where(np.expand_dims(unseen, (1, 3)), p.values(noise, problem.inputs[name].shape, "normal", problem.dtype),
                       problem.inputs[name]) for name in "kv"
    }  # fmt: skip
    seeds = {
        name: a * (np.arange(L_q) < half)[(..., None) if name == "o" else ...] for name, a in problem.cotangents.items()
    }
    first, second = (_run(subject, _given(changed(problem, seeds), x), True) for x in ({}, other))
    verdicts = [equal("rows", [(a[:, :, :half], b[:, :, :half]) for a, b in zip(first.outputs, second.outputs)])]
    if first.gradients[1] is not None:
        leak = sum(float(np.abs(to_array(g) * np.expand_dims(unseen, (1, 3))).sum()) for g in first.gradients[1:])
        verdicts.append(Verdict("gradient of what is hidden", leak, 0.0))
    return verdicts


def padding(subject: Subject, problem: Problem) -> list[Verdict]:
    """Keys behind a length are as good as removed; with ours they may hold NaN."""
    L_k = problem.inputs["k"].shape[2]
    kept = max(L_k - 3, 0)
    problem = _with(problem, causal=False, window=None)
    lengths = _constant(problem, key_lengths=np.full(len(problem.inputs["q"]), kept), prefix=None)
    garbage = {name: problem.inputs[name].copy() for name in "kv"}
    for array in garbage.values():
        array[:, :, kept:] = np.nan if subject.ours else 3.0
    clean, dirty = _run(subject, lengths, True), _run(subject, _given(lengths, garbage), True)
    shorter = _given(problem, {name: problem.inputs[name][:, :, :kept] for name in "kv"})
    cut = _o(subject, _constant(shorter, key_lengths=None, prefix=None))
    rule = expectations(lengths)[0]
    return [
        equal("all results", list(zip(clean.results, dirty.results))),
        _near("o", clean.outputs[0], cut, rule, rule),
    ]


def nothing_seen(subject: Subject, problem: Problem) -> list[Verdict]:
    """Queries that see no key: output 0, log-sum-exp -inf, gradient 0; a batch with such a row keeps the others."""
    empty = _constant(
        _with(problem, causal=False, window=None), key_lengths=np.zeros(len(problem.inputs["q"]), int), prefix=None
    )
    run = _run(subject, empty, True)
    verdicts = [Verdict("o", float(np.abs(to_array(run.outputs[0])).sum()), 0.0)]
    if len(run.outputs) > 1:
        verdicts.append(Verdict("lse", float((run.outputs[1] != float("-inf")).sum()), 0.0))
    found = [to_array(g) for g in run.gradients if g is not None]
    verdicts.append(Verdict("gradients", float(sum((g != 0).sum() for g in found)), 0.0))
    return verdicts


def masks_agree(subject: Subject, problem: Problem) -> list[Verdict]:
    """A window as long as the text is causal; a prefix of 0 is causal; a prefix of all keys is full."""
    L_q, L_k = problem.inputs["q"].shape[2], problem.inputs["k"].shape[2]
    causal = _constant(_with(problem, causal=True, window=None), key_lengths=None, prefix=None)
    plain = _o(subject, causal)
    rule = expectations(causal)[0]
    batch = len(problem.inputs["q"])
    full = _with(causal, causal=False)
    return [
        _near("window", _o(subject, _with(causal, window=L_q + L_k)), plain, rule, rule),
        _near("prefix 0", _o(subject, _constant(causal, prefix=np.zeros(batch, int))), plain, rule, rule),
        _near("prefix of all", _o(subject, _constant(causal, prefix=np.full(batch, L_k))), _o(subject, full),
              *[expectations(full)[0]] * 2),
    ]  # fmt: skip


# ---- relations


def convex(subject: Subject, problem: Problem) -> list[Verdict]:
    """Every output lies between the smallest and the largest value of its column; equal values come out as they are."""
    rule = expectations(problem)[0]
    v = problem.inputs["v"]
    o = to_array(_o(subject, problem))
    group = o.shape[1] // v.shape[1]
    low, high = (f(v, axis=2, keepdims=True).repeat(group, 1) for f in (np.min, np.max))
    seen = p.dense(problem).keep.any(-1, keepdims=True)
    outside = np.where(seen, np.maximum(np.maximum(low - o, o - high), 0), np.abs(o))
    same = changed(problem, v=np.broadcast_to(v[:, :, :1], v.shape).copy())
    first = same.inputs["v"][:, :, :1].repeat(group, 1)
    constant = np.where(seen, np.abs(to_array(_o(subject, same)) - first), 0)
    return [within("between", outside, rule.allowed), within("constant", constant, expectations(same)[0].allowed)]


def linear(subject: Subject, problem: Problem) -> list[Verdict]:
    """f(2 V1 + V2) = 2 f(V1) + f(V2), on integers, whose sums are exact."""
    v = np.round(problem.inputs["v"])
    other = np.roll(v, 1, axis=2)
    parts = [changed(problem, v=a) for a in (2 * v + other, v, other)]
    whole, one, two = (to_array(_o(subject, q)) for q in parts)
    rules = [expectations(q)[0].allowed for q in parts]
    return [within("o", np.abs(whole - 2 * one - two), rules[0] + 2 * rules[1] + rules[2])]


def shifted_keys(subject: Subject, problem: Problem) -> list[Verdict]:
    """The same vector added to all keys moves a row of scores as a whole: the output stays, the log-sum-exp moves."""
    k = np.round(4 * problem.inputs["k"]) / 4
    u = np.round(np.random.default_rng(0).standard_normal(k.shape[-1]))
    here, there = changed(problem, k=k), changed(problem, k=k + u)
    a, b = _run(subject, here), _run(subject, there)
    rules = expectations(here), expectations(there)
    verdicts = [_near("o", a.outputs[0], b.outputs[0], rules[0][0], rules[1][0])]
    if len(a.outputs) > 1:
        d = p.dense(here)
        seen = d.keep.any(-1)
        moved = np.where(seen, to_array(a.outputs[1]) + d.scale * (d.q @ u), 0)
        error = np.abs(np.where(seen, to_array(b.outputs[1]), 0) - moved)
        verdicts.append(within("lse", error, rules[0][1].allowed + rules[1][1].allowed))
    return verdicts


def permuted(subject: Subject, problem: Problem) -> list[Verdict]:
    """Keys with their values in another order change nothing; queries, heads and sequences carry their rows along."""
    problem = _constant(_with(problem, causal=False, window=None), key_lengths=None, prefix=None)
    i, rng = problem.inputs, np.random.default_rng(1)
    plain, rule = _o(subject, problem), expectations(problem)[0]
    keys, rows = rng.permutation(i["k"].shape[2]), rng.permutation(i["q"].shape[2])
    other = _o(subject, changed(problem, k=i["k"][:, :, keys], v=i["v"][:, :, keys]))
    verdicts = [_near("keys", other, plain, rule, rule)]
    turned = _o(subject, changed(problem, q=i["q"][:, :, rows]))
    verdicts.append(_near("queries", turned, plain[:, :, torch.from_numpy(rows).to(plain.device)],
                          replace(rule, allowed=rule.allowed[:, :, rows]), replace(rule, allowed=rule.allowed[:, :, rows])))  # fmt: skip
    group = i["q"].shape[1] // i["k"].shape[1]
    flipped = changed(problem, q=i["q"].reshape(len(i["q"]), -1, group, *i["q"].shape[2:])[::-1, ::-1].reshape(i["q"].shape),
                      k=i["k"][::-1, ::-1], v=i["v"][::-1, ::-1])  # fmt: skip
    back = _o(subject, flipped).unflatten(1, (-1, group)).flip(0, 1).flatten(1, 2)
    return [*verdicts, equal("heads and sequences", [(back, plain)])]


def merged(subject: Subject, problem: Problem) -> list[Verdict]:
    """Keys cut in two anywhere (a part may be empty), and the parts merged by their log-sum-exps, give the whole."""
    problem = _constant(_with(problem, causal=False, window=None), key_lengths=None, prefix=None)
    i, rng = problem.inputs, np.random.default_rng(len(problem.inputs["q"]))
    cut = int(rng.integers(0, i["k"].shape[2] + 1))
    parts = [changed(problem, k=i["k"][:, :, s], v=i["v"][:, :, s]) for s in (slice(cut), slice(cut, None))]
    runs = [[to_array(t) for t in _run(subject, q).outputs] for q in (problem, *parts)]
    (o, lse), *rest = runs
    total = np.logaddexp(rest[0][1], rest[1][1])
    joint = sum(np.exp(part[1] - total)[..., None] * part[0] for part in rest)
    allowed = [sum(a) for a in zip(*([e.allowed for e in expectations(q)[:2]] for q in (problem, *parts)))]
    top = max(np.abs(i["v"]).max(initial=0.0), 1.0)  # an error of the log-sum-exp weighs a whole value
    return [within("o", np.abs(o - joint), allowed[0] + 2 * top * np.expand_dims(allowed[1], -1)),
            within("lse", np.abs(lse - total), allowed[1])]  # fmt: skip


def grouped(subject: Subject, problem: Problem) -> list[Verdict]:
    """A group of heads on one key head is as many heads on copies of it; its gradient is the sum over the copies."""
    i = problem.inputs
    group = i["q"].shape[1] // i["k"].shape[1]
    copies = changed(problem, k=i["k"].repeat(group, 1), v=i["v"].repeat(group, 1))
    a, b = _run(subject, problem, True), _run(subject, copies, True)
    verdicts = [equal("o", [(a.outputs[0], b.outputs[0])])]
    if not subject.differentiable:
        return verdicts
    verdicts.append(equal("dq", [(a.gradients[0] + 0.0, b.gradients[0] + 0.0)]))
    for n, rule, alone in zip((1, 2), expectations(problem)[-2:], expectations(copies)[-2:]):
        total = to_array(b.gradients[n]).reshape(*i["k"].shape[:2], group, *b.gradients[n].shape[2:]).sum(2)
        allowed = alone.allowed.reshape(*i["k"].shape[:2], group, *alone.allowed.shape[2:]).sum(2)
        verdicts.append(within(rule.name, np.abs(to_array(a.gradients[n]) - total), rule.allowed + allowed))
    return verdicts


def doubled_keys(subject: Subject, problem: Problem) -> list[Verdict]:
    """Every key twice: the same output, and log 2 more."""
    problem = _constant(_with(problem, causal=False, window=None), key_lengths=None, prefix=None)
    i = problem.inputs
    twice = changed(problem, k=i["k"].repeat(2, 2), v=i["v"].repeat(2, 2))
    a, b = _run(subject, problem), _run(subject, twice)
    rules = expectations(problem), expectations(twice)
    return [_near("o", a.outputs[0], b.outputs[0], rules[0][0], rules[1][0]),
            _near("lse", a.outputs[1] + np.log(2), b.outputs[1], rules[0][1], rules[1][1])]  # fmt: skip


def gradient_sums(subject: Subject, problem: Problem) -> list[Verdict]:
    """A row of dS sums to 0, so that dK sums to 0 over the keys; a row of P to 1, so that dV sums to what arrives."""
    cotangents = {n: a * (n == "o") for n, a in problem.cotangents.items()}
    problem = changed(problem, cotangents)
    run, rules = _run(subject, problem, True), expectations(problem)
    d = p.dense(problem)
    arriving = (d.do * d.keep.any(-1, keepdims=True)).sum(2)  # (B, H, d_v)
    group = d.q.shape[1] // problem.inputs["k"].shape[1]
    arriving = arriving.reshape(len(arriving), -1, group, arriving.shape[-1]).sum(2)
    return [
        within("sum of dk", np.abs(to_array(run.gradients[1]).sum(2)), rules[-2].allowed.sum(2)),
        within("sum of dv", np.abs(to_array(run.gradients[2]).sum(2) - arriving), rules[-1].allowed.sum(2)),
    ]


def capped(subject: Subject, problem: Problem) -> list[Verdict]:
    """A soft cap far above the scores is none, and one below them keeps the log-sum-exp below cap + log of the keys."""
    free, high, low = (_with(problem, softcap=c) for c in (None, 1e3, 0.5))
    a, b, c = (_run(subject, q).outputs for q in (free, high, low))
    s = np.where(p.dense(free).keep, np.abs(p.dense(free).s), 0).max(initial=0.0)
    bend = 2 * s**3 / 1e6 * max(np.abs(problem.inputs["v"]).max(initial=0.0), 1)  # tanh is not quite the identity
    rules = expectations(free), expectations(high), expectations(low)
    keys = p.dense(free).keep.sum(-1)
    beyond = np.where(keys > 0, np.abs(to_array(c[1]) - np.log(np.maximum(keys, 1))) - 0.5, 0)
    return [within("o", np.maximum(np.abs(to_array(a[0]) - to_array(b[0])) - bend, 0), rules[0][0].allowed + rules[1][0].allowed),
            within("lse", np.maximum(beyond, 0), rules[2][1].allowed)]  # fmt: skip


def scaled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Powers of two move between q, k and the scale without changing a bit of the output."""
    i = problem.inputs
    scale = i["q"].shape[-1] ** -0.5 if problem.parameters["scale"] is None else problem.parameters["scale"]
    tame = changed(problem, q=np.round(8 * i["q"]) / 8, k=np.round(8 * i["k"]) / 8)  # no subnormals in float16
    plain = _o(subject, _with(tame, scale=scale))
    q, k = tame.inputs["q"], tame.inputs["k"]
    return [
        equal("q and k", [(_o(subject, _with(changed(tame, q=4 * q, k=k / 4), scale=scale)), plain)]),
        equal("q and scale", [(_o(subject, _with(changed(tame, q=2 * q), scale=scale / 2)), plain)]),
    ]


# ---- packed documents


def packed(subject: Subject, problem: Problem) -> list[Verdict]:
    """Each document comes out as it would alone, and does not change by a bit when another one does."""
    c, i = problem.constants, problem.inputs
    a, b = c["starts_q"], c["starts_k"]
    whole, rule = _run(subject, problem, True), expectations(problem)[0]
    verdicts = []
    for n in range(len(a) - 1):
        rows, cols = slice(a[n], a[n + 1]), slice(b[n], b[n + 1])
        alone = changed(problem, {"o": problem.cotangents["o"][rows]}, q=i["q"][rows], k=i["k"][cols], v=i["v"][cols])
        size = [np.array([0, s.stop - s.start], np.int32) for s in (rows, cols)]
        alone = _constant(alone, starts_q=size[0], starts_k=size[1])
        own = replace(rule, allowed=rule.allowed[rows])
        verdicts.append(_near(f"document {n}", whole.outputs[0][rows], _o(subject, alone), own, own))
    keys = slice(b[1], b[2])
    noise = np.random.default_rng(0)
    other = {name: i[name].copy() for name in "kv"}
    for array in other.values():
        array[keys] = p.values(noise, array[keys].shape, "normal", problem.dtype)
    after = _o(subject, _given(problem, other))
    rest = np.ones(len(i["q"]), dtype=bool)
    rest[a[1] : a[2]] = False
    index = torch.from_numpy(np.flatnonzero(rest)).to(after.device)
    return [*verdicts, equal("the others", [(whole.outputs[0][index], after[index])])]


def empty(subject: Subject, problem: Problem) -> list[Verdict]:
    """No sequences, no queries or no keys: results of the right shape, and zeros."""
    wrong = 0
    for B, L_q, L_k in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        shapes = {
            "q": (B, 2, L_q, 8),
            "k": (B, 1, L_k, 8),
            "v": (B, 1, L_k, 4),
            "o": (B, 2, L_q, 4),
            "lse": (B, 2, L_q),
        }
        nothing = changed(replace(problem, layouts={}), {n: np.ones(shapes[n]) for n in problem.cotangents},
                          **{n: np.ones(shapes[n]) for n in "qkv"})  # fmt: skip
        nothing = _constant(_with(nothing, window=None), key_lengths=None, prefix=None)
        run = _run(subject, nothing, True)
        for tensor, like in [(run.outputs[0], shapes["o"]), *zip(run.gradients, nothing.inputs.values())]:
            shape = like if isinstance(like, tuple) else like.shape
            wrong += tensor is not None and (tuple(tensor.shape) != shape or bool((tensor != 0).any()))
    return [Verdict("shapes and zeros", int(wrong), 0.0)]


SMOOTH = ("normal",)


def _draw(**options: Any) -> Callable:
    return lambda function, dtype, gpu: p.problems(function, dtype, gpu, **options)


def _relation(**options: Any) -> Callable:
    return _draw(kinds=SMOOTH, layouts=False, small=True, **options)


BY_VALUE = universal.properties(p.FUNCTIONS, _draw(), expectations)[:2]
THE_REST = universal.properties(
    ("attention_with_lse", "packed_attention"), _draw(kinds=SMOOTH, small=True), expectations
)[2:]
PLAIN, WITH_LSE = ("attention",), ("attention_with_lse",)

PROPERTIES = (
    *BY_VALUE,
    Property("any-launch", ("attention_with_lse", "packed_attention"), _draw(launches=True), any_launch, ours_only=True, share=0.5),
    *THE_REST,
    Property("hidden", PLAIN, _relation(), hidden, share=0.5),
    Property("padding", PLAIN, _relation(masks=("full",)), padding, share=0.25),
    Property("nothing-seen", p.DENSE, _relation(masks=("full",)), nothing_seen, share=0.25),
    Property("masks-agree", PLAIN, _relation(masks=("causal", "top-left")), masks_agree, share=0.25),
    Property("convex", PLAIN, _relation(), convex, share=0.25),
    Property("linear-in-values", PLAIN, _relation(), linear, share=0.25),
    Property("shifted-keys", p.DENSE, _relation(softcaps=(None,)), shifted_keys, share=0.25),
    Property("permuted", PLAIN, _relation(masks=("full",)), permuted, share=0.25),
    Property("merged", WITH_LSE, _relation(masks=("full",)), merged, share=0.25),
    Property("grouped", PLAIN, _relation(), grouped, share=0.25),
    Property("doubled-keys", WITH_LSE, _relation(masks=("full",)), doubled_keys, share=0.25),
    Property("gradient-sums", PLAIN, _relation(softcaps=(None,)), gradient_sums, share=0.25, gradient=True),
    Property("soft-cap", WITH_LSE, _relation(), capped, share=0.25),
    Property("scale", PLAIN, _relation(softcaps=(None,)), scaled, share=0.25),
    Property("packed", ("packed_attention",), _relation(masks=("full", "causal", "top-left", "window")), packed, share=0.25),
    Property("empty", p.DENSE, _relation(masks=("full",)), empty, share=0.0, ours_only=True),
)  # fmt: skip
