r"""What must hold of decoding: agreement with the reference, and relations that need none.

Every check takes the subject and a problem and returns verdicts. Where the arithmetic is the same (garbage behind a
length, other sequences, keys that nobody sees) the bits must be equal; other relations inherit their allowances from
the rule of the comparison itself.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from kernels import universal
from kernels.decode import launch, reference
from kernels.decode import problems as p
from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.subject import Subject, equal, execute
from kernels.tolerance import Expectation, Verdict, expect
from kernels.universal import judged, within

DENSE, PAGED, LATENT, MERGE = p.FUNCTIONS


def expectations(problem: Problem) -> list[Expectation]:
    """The truth about both outputs, in order of `problems.result_names`."""
    names = p.result_names(problem.function)
    return expect(
        getattr(reference, problem.function), list(problem.inputs.values()), list(problem.cotangents.values()),
        problem.dtype, names, p.scales(problem), constants=list(problem.constants.values()),
        dtypes=[problem.dtype_of(name) for name in names], **problem.parameters,
    )  # fmt: skip


def _run(subject: Subject, problem: Problem) -> list[torch.Tensor]:
    return execute(subject, problem, gradients=False).outputs


def _with(problem: Problem, lengths: np.ndarray | None = None, **inputs: np.ndarray) -> Problem:
    """The same problem with other values, contiguous; lengths if they are given."""
    constants = dict(problem.constants)
    if lengths is not None:
        constants["lengths"] = lengths
    return replace(problem, layouts={}, inputs={**problem.inputs, **inputs}, constants=constants)


def _lengths(problem: Problem) -> np.ndarray:
    capacity, given = p.dense(problem)[0].shape[2], problem.constants["lengths"]
    B = len(problem.inputs["q"])
    return np.full(B, capacity, np.int32) if given is None else np.minimum(given, capacity)


def _close(a: list[torch.Tensor], b: list[torch.Tensor], first: Problem, second: Problem) -> list[Verdict]:
    """Both outputs of two problems that must agree: within what each may be from its truth."""
    found = []
    for x, y, ours, theirs in zip(a, b, expectations(first), expectations(second)):
        x, y = to_array(x), to_array(y)
        with np.errstate(invalid="ignore"):
            error = np.where(x == y, 0.0, np.abs(x - y))
        found.append(within(ours.name, error, ours.allowed + theirs.allowed))
    return found


# ---- against the reference, with other launches than ours


def _any_launch(subject: Subject, problem: Problem) -> list[Verdict]:
    latent = problem.function == LATENT

    def forced(*operands):
        q, k, *rest = operands
        parameters = dict(zip(problem.parameters, operands[-len(problem.parameters) :]))
        if latent:
            k = k.unsqueeze(1)
            v, lengths, table = k[..., : parameters["d_v"]], rest[0], None
        else:
            v, lengths, table = rest[0], rest[1], rest[2] if problem.function == PAGED else None
        scale = parameters["scale"] or q.shape[-1] ** -0.5
        return launch.decode(
            q, k, v, lengths, table, scale, parameters["window"], parameters["softcap"], latent, None, problem.launch
        )

    run = execute(replace(subject, functions={problem.function: forced}), problem, gradients=False)
    return judged(run.outputs, expectations(problem))


def _contract(subject: Subject, problem: Problem) -> list[Verdict]:
    """Shapes and dtypes of results are those promised; ours are contiguous."""
    o, lse = _run(subject, problem)
    truth = expectations(problem)
    wrong = tuple(o.shape) != truth[0].truth.shape or str(o.dtype) != f"torch.{problem.dtype}"
    wrong += tuple(lse.shape) != truth[1].truth.shape or lse.dtype != torch.float32
    wrong += subject.ours and not (o.is_contiguous() and lse.is_contiguous())
    return [Verdict("shape, dtype, layout", int(wrong), 0.0)]


# ---- what has no effect: equal bits


def _garbage(subject: Subject, problem: Problem) -> list[Verdict]:
    """NaN and infinities behind every length, and in table entries nobody needs, have no effect."""
    lengths, dirty, constants = _lengths(problem), {}, dict(problem.constants)
    clean = _with(problem, lengths)
    for name, bad in (("k", np.nan), ("v", np.inf), ("c", np.nan)):
        if name not in problem.inputs:
            continue
        array = problem.inputs[name].copy()
        if problem.function == PAGED:
            page, table = array.shape[2], problem.constants["table"].copy()
            used = np.zeros((len(array), page), bool)
            for b, n in enumerate(lengths):
                for j in range(n):
                    used[table[b, j // page], j % page] = True
                table[b, -(-int(n) // page) :] = len(array) - 1
            array[~used.any(1)] = bad
            array.swapaxes(1, 2)[~used] = bad
            constants["table"] = table
        else:
            for b, n in enumerate(lengths):
                array[b, ..., n:, :] = bad
        dirty[name] = array
    soiled = replace(clean, inputs={**clean.inputs, **dirty}, constants={**constants, "lengths": lengths})
    return [equal("both", list(zip(_run(subject, clean), _run(subject, soiled))))]


def _cut_short(subject: Subject, problem: Problem) -> list[Verdict]:
    """A cache with room to spare gives what the cache cut off at the longest length gives."""
    lengths = _lengths(problem)
    n = max(int(lengths.max()), 1)
    inputs = {name: a[..., :n, :] for name, a in problem.inputs.items() if name != "q"}
    short, long = _with(problem, lengths, **inputs), _with(problem, lengths)
    return _close(_run(subject, long), _run(subject, short), long, short)


def _causality(subject: Subject, problem: Problem) -> list[Verdict]:
    """The newest token changes no older row, and tokens behind the window change none."""
    lengths, window, L_q = _lengths(problem), problem.parameters["window"], problem.inputs["q"].shape[2]
    rng, changed, hidden = np.random.default_rng(1), {}, {}
    for name in ("k", "v"):
        changed[name], hidden[name] = problem.inputs[name].copy(), problem.inputs[name].copy()
        for b, n in enumerate(lengths):
            if n:
                changed[name][b, :, n - 1] += rng.integers(1, 9)
            if window is not None:
                hidden[name][b, :, : max(int(n) - L_q - window + 1, 0)] = 7.0
    first = _run(subject, _with(problem, lengths))
    later, behind = _run(subject, _with(problem, lengths, **changed)), _run(subject, _with(problem, lengths, **hidden))
    older = [(a[:, :, : L_q - 1], b[:, :, : L_q - 1]) for a, b in zip(first, later)]
    return [equal("older rows", older), equal("behind the window", list(zip(first, behind)))]


def _alone(subject: Subject, problem: Problem) -> list[Verdict]:
    """A sequence does not see the others: changing them leaves its bits alone."""
    lengths = _lengths(problem)
    inputs = {name: np.concatenate([a[:1], 3 * a[1:] + 1]) for name, a in problem.inputs.items()}
    a, b = _run(subject, _with(problem, lengths)), _run(subject, _with(problem, lengths, **inputs))
    return [equal("the first sequence", [(x[:1], y[:1]) for x, y in zip(a, b)])]


# ---- splitting and merging


def _parts(subject: Subject, problem: Problem, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the stretches of keys between cuts, each on its own: (n, B, H, 1, d_v), (n, B, H, 1)."""
    lengths, found = _lengths(problem), []
    for start, stop in zip(cuts, cuts[1:]):
        stretch = {name: problem.inputs[name][:, :, start : max(stop, start + 1)] for name in ("k", "v")}
        there = np.clip(lengths, start, stop) - start
        found.append(_run(subject, _with(problem, there.astype(np.int32), **stretch)))
    return torch.stack([o for o, _ in found]), torch.stack([lse for _, lse in found])


def _split_merge(subject: Subject, problem: Problem) -> list[Verdict]:
    """Any cuts, empty stretches among them, and the merge is the whole."""
    if MERGE not in subject.functions:
        return [Verdict("nothing to merge with", 0.0, 0.0)]
    capacity, rng = problem.inputs["k"].shape[2], np.random.default_rng(1)
    cuts = [0, *sorted(rng.integers(0, capacity, 3).tolist()), capacity]
    o, lse = subject.functions[MERGE](*_parts(subject, problem, cuts))
    plain = _with(problem, _lengths(problem))
    rules = expectations(plain)
    wider = [replace(rule, allowed=4 * rule.allowed, allowed_rms=4 * rule.allowed_rms) for rule in rules]
    return judged([o, lse], wider)  # every part was rounded once more


def _merge_relations(subject: Subject, problem: Problem) -> list[Verdict]:
    """One part is itself; empty parts, whatever they hold, change no bit; order does not matter; parts merge in pairs."""
    o, lse = problem.inputs["o"], problem.inputs["lse"]
    first = [_run(subject, _with(problem, o=x, lse=y))[0] for x, y in ((o, lse), (o[:1], lse[:1]))]
    alive = np.isfinite(lse[0])[..., None]
    single = torch.from_numpy(np.where(alive, o[0], 0.0)).to(first[1])
    dead, gone = np.full_like(o[:2], np.nan), np.full_like(lse[:2], -np.inf)
    padded = _run(subject, _with(problem, o=np.concatenate([o, dead]), lse=np.concatenate([lse, gone])))
    plain = _run(subject, _with(problem))
    turned = _with(problem, o=o[::-1].copy(), lse=lse[::-1].copy())
    return [
        equal("one part", [(first[1] + 0.0, single + 0.0)]),
        *_close(padded, plain, problem, problem),
        *_close(_run(subject, turned), plain, turned, problem),
    ]


# ---- relations of attention


def _convex(subject: Subject, problem: Problem) -> list[Verdict]:
    """Every output lies between the smallest and the largest value; equal values come out as they are."""
    o = to_array(_run(subject, _with(problem))[0])
    allowed = expectations(_with(problem))[0].allowed
    v = p.dense(problem)[1]
    top, bottom = v.max(initial=0.0), v.min(initial=0.0)  # 0 too: what a query without keys gets
    outside = np.maximum(np.maximum(o - top, bottom - o), 0.0)
    same = _with(problem, v=np.full_like(problem.inputs["v"], 3.0))
    o, lse = _run(subject, same)
    some = torch.isfinite(lse)[..., None]
    constant = np.abs(to_array(o) - to_array(torch.where(some, 3.0, 0.0)))
    return [within("o outside of the values", outside, allowed),
            within("o of equal values", constant, expectations(same)[0].allowed)]  # fmt: skip


def _linear(subject: Subject, problem: Problem) -> list[Verdict]:
    """Linear in the values: f(2 V1 + V2) = 2 f(V1) + f(V2), on integers, whose sums are exact."""
    one = np.round(np.clip(problem.inputs["v"], -2, 2))
    other = np.roll(one, 1, axis=2)
    cases = [_with(problem, v=v) for v in (one, other, 2 * one + other)]
    a, b, c = (to_array(_run(subject, case)[0]) for case in cases)
    allowed = [expectations(case)[0].allowed for case in cases]
    return [within("o", np.abs(c - 2 * a - b), 2 * allowed[0] + allowed[1] + allowed[2])]


def _shifted(subject: Subject, problem: Problem) -> list[Verdict]:
    """The same vector added to all keys: the output stays, the log-sum-exp moves by its score."""
    q, d = problem.inputs["q"], problem.inputs["q"].shape[-1]
    u = np.random.default_rng(1).integers(-1, 2, d).astype(np.float64)
    whole = np.round(4 * np.clip(problem.inputs["k"], -4, 4)) / 4  # so that the sums are exact
    cases = [_with(problem, k=k) for k in (whole, whole + u)]
    (o, lse), (o_moved, lse_moved) = (_run(subject, case) for case in cases)
    by = (q @ u) * (problem.parameters["scale"] or d**-0.5)  # (B, H, L_q)
    allowed = [expectations(case) for case in cases]
    with np.errstate(invalid="ignore"):
        error = np.nan_to_num(to_array(lse_moved) - to_array(lse) - by, nan=0.0)
    return [
        within("o", np.abs(to_array(o_moved) - to_array(o)), allowed[0][0].allowed + allowed[1][0].allowed),
        within("lse", np.abs(error), allowed[0][1].allowed + allowed[1][1].allowed),
    ]


def _permuted(subject: Subject, problem: Problem) -> list[Verdict]:
    """Keys in another order, values with them: the same."""
    lengths, rng = _lengths(problem), np.random.default_rng(1)
    other = {name: problem.inputs[name].copy() for name in ("k", "v")}
    for b, n in enumerate(lengths):
        order = rng.permutation(int(n))
        for name in ("k", "v"):
            other[name][b, :, :n] = problem.inputs[name][b][:, order]
    a, b = _with(problem, lengths), _with(problem, lengths, **other)
    return _close(_run(subject, a), _run(subject, b), a, b)


def _doubled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Every key twice: the same output, and a log-sum-exp larger by log 2."""
    twice = {name: np.repeat(problem.inputs[name], 2, axis=2) for name in ("k", "v")}
    a, b = _with(problem, _lengths(problem)), _with(problem, 2 * _lengths(problem), **twice)
    first, second = _run(subject, a), _run(subject, b)
    return _close([first[0], first[1] + np.log(2.0).astype(np.float32)], second, a, b)


def _heads(subject: Subject, problem: Problem) -> list[Verdict]:
    """A group that shares keys gives what every head with a copy of its own gives."""
    times = problem.inputs["q"].shape[1] // problem.inputs["k"].shape[1]
    copies = {name: np.repeat(problem.inputs[name], times, axis=1) for name in ("k", "v")}
    a, b = _with(problem), _with(problem, **copies)
    return _close(_run(subject, a), _run(subject, b), a, b)


def _scaled(subject: Subject, problem: Problem) -> list[Verdict]:
    """f(2 q, k / 2) = f(q, k) bit by bit."""
    k = np.round(4 * np.clip(problem.inputs["k"], -4, 4)) / 4  # halves stay exact
    a, b = _with(problem, k=k), _with(problem, q=2 * problem.inputs["q"], k=k / 2)
    return [equal("both", list(zip(_run(subject, a), _run(subject, b))))]


def _steps(subject: Subject, problem: Problem) -> list[Verdict]:
    """Step by step with one new token is all at once with many: step t equals row t."""
    k = problem.inputs["k"]
    T, H = min(k.shape[2], 6), problem.inputs["q"].shape[1]
    q = p.values(np.random.default_rng(1), (len(k), H, T, k.shape[3]), "normal", problem.dtype)
    n = np.full(len(k), T, np.int32)
    prefill = _with(problem, n, q=q)
    outputs, rules, found = _run(subject, prefill), expectations(prefill), []
    for t in range(T):
        step = _with(problem, n - T + t + 1, q=q[:, :, t : t + 1])
        for x, y, rule, own in zip(outputs, _run(subject, step), rules, expectations(step)):
            error = np.abs(to_array(x[:, :, t : t + 1]) - to_array(y))
            found.append(within(f"{rule.name} of step {t}", error, (rule.allowed.max() + own.allowed.max())))
    return found


def _dense_form(subject: Subject, problem: Problem) -> list[Verdict]:
    """Pages in order are a plain cache, and so is a latent that is key and value."""
    if DENSE not in subject.functions:
        return [Verdict("no plain cache", 0.0, 0.0)]
    k, v = p.dense(problem)
    parameters = {name: x for name, x in problem.parameters.items() if name != "d_v"}
    inputs = {"q": problem.inputs["q"], "k": k, "v": np.ascontiguousarray(v)}
    plain = replace(problem, function=DENSE, inputs=inputs, layouts={}, parameters=parameters,
                    constants={"lengths": problem.constants["lengths"]})  # fmt: skip
    return _close(_run(subject, problem), _run(subject, plain), problem, plain)


# ---- nothing there


def _empty(subject: Subject, problem: Problem) -> list[Verdict]:
    """No keys: 0 and -inf. No sequences, heads of none, no new tokens: empty results of the right shape."""
    nothing = _with(problem, np.zeros(len(problem.inputs["q"]), np.int32))
    o, lse = _run(subject, nothing)
    wrong = int((o != 0).sum()) + int((lse != -np.inf).sum())
    q, k, v = (problem.inputs[name] for name in ("q", "k", "v"))
    for inputs in ((q[:0], k[:0], v[:0]), (q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0])):
        case = _with(problem, np.zeros(len(inputs[0]), np.int32), **dict(zip("qkv", inputs)))
        o, lse = _run(subject, case)
        wrong += tuple(o.shape) != (*inputs[0].shape[:3], v.shape[3]) or tuple(lse.shape) != inputs[0].shape[:3]
        wrong += bool((o != 0).any()) or bool((lse != -np.inf).any())
    return [Verdict("zeros, -inf, shapes", wrong, 0.0)]


def _draw(**options) -> Callable:
    return lambda function, dtype, gpu: p.problems(function, dtype, gpu, **options)


def _relation(**options) -> Callable:
    return _draw(kinds=("normal",), layouts=False, **options)


PLAIN_SCORES = {"window": (None,), "softcap": (None,)}
THE_REST = universal.properties(p.FUNCTIONS, _draw(), expectations, gradient=False)

PROPERTIES = (
    *(prop for prop in THE_REST if prop.name != "contract"),
    Property("contract", p.FUNCTIONS, _draw(), _contract, share=0.25),
    Property("any-launch", p.DECODERS, _draw(launches=True), _any_launch, ours_only=True, share=0.5),
    Property("garbage", p.DECODERS, _relation(full=False), _garbage, share=0.25),
    Property("room-to-spare", (DENSE, LATENT), _relation(full=False), _cut_short, share=0.25),
    Property("causality", (DENSE,), _relation(), _causality, share=0.25),
    Property("sequences-alone", (DENSE,), _relation(), _alone, share=0.25),
    Property("split-and-merge", (DENSE,), _relation(one_new=True, window=(None,)), _split_merge, share=0.25),
    Property("merge", (MERGE,), _draw(layouts=False), _merge_relations, share=0.5),
    Property("convexity", (DENSE,), _relation(), _convex, share=0.25),
    Property("linear-in-values", (DENSE,), _relation(), _linear, share=0.25),
    Property("shifted-keys", (DENSE,), _relation(**PLAIN_SCORES), _shifted, share=0.25),
    Property("permuted-keys", (DENSE,), _relation(one_new=True, window=(None,)), _permuted, share=0.25),
    Property("doubled-keys", (DENSE,), _relation(one_new=True, window=(None,)), _doubled, share=0.25),
    Property("heads-share", (DENSE,), _relation(), _heads, share=0.25),
    Property("scale", (DENSE,), _relation(), _scaled, share=0.25),
    Property("steps-are-rows", (DENSE,), _relation(), _steps, share=0.25),
    Property("plain-cache", (PAGED, LATENT), _relation(), _dense_form, share=0.25),
    Property("empty", (DENSE,), _relation(), _empty, share=0.0),
)
