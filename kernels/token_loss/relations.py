"""Relations that need no reference: of softmax and likelihood, and between functions."""

from dataclasses import replace

import numpy as np

from kernels.problem import Problem, to_array
from kernels.subject import Subject, equal
from kernels.token_loss import problems as p
from kernels.token_loss.relating import apart, data, relation, run, with_
from kernels.tolerance import Verdict
from kernels.universal import changed, within

SMALL = {"float32": 2e-5, "float16": 2e-5, "bfloat16": 2e-5}  # of float32 statistics of tame logits, a few units at 8


# ---- softmax and likelihood


def shifted(subject: Subject, problem: Problem) -> list[Verdict]:
    """One number added to all logits of a row (exactly) changes no bit of log-prob, entropy and gradient; LSE moves by it."""
    moved = changed(problem, logits=problem.inputs["logits"] + 1024.0)
    a, b = run(subject, problem), run(subject, moved)
    shift = np.where(p.keep_of(problem), 1024.0 / problem.parameters["temperature"], 0.0)
    names = ("logp", "entropy")
    if subject.ours:
        return [equal("log-prob and entropy", [(a[n], b[n]) for n in names]),
                apart("lse", to_array(a["lse"]) + shift, b["lse"], 5e-4)]  # fmt: skip
    return [apart(n, a[n], b[n], 1e-3) for n in names]


def normalised(subject: Subject, problem: Problem) -> list[Verdict]:
    """Probabilities sum to 1; LSE is at least the largest logit; the entropy lies between 0 and log V."""
    found = run(subject, problem, gradients=False)
    if problem.function == "softmax":
        y = to_array(found["y"])
        unit = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[problem.dtype]
        return [within("sum", np.atleast_1d(np.abs(y.sum(-1) - 1)), unit * np.sqrt(y.shape[-1]))]
    z = p.logits_of(problem) / problem.parameters["temperature"]
    keep = p.keep_of(problem)
    slack = 1e-6 * (1 + np.abs(np.where(np.isfinite(z), z, 0)).max(-1))
    lse, entropy = to_array(found["lse"]), to_array(found["entropy"])
    below = np.where(keep, np.maximum(z.max(-1) - lse, 0), 0) / slack
    outside = np.where(keep, np.maximum(np.maximum(-entropy, entropy - np.log(z.shape[-1])), 0), 0) / slack
    return [within("lse", np.atleast_1d(below), 1.0), within("entropy", np.atleast_1d(outside), 4.0)]


def vocabulary_permuted(subject: Subject, problem: Problem) -> list[Verdict]:
    """Relabelling the vocabulary relabels the gradient and leaves the rest."""
    V = problem.inputs["logits"].shape[-1]
    order = np.random.default_rng(V).permutation(V)
    place = np.argsort(order)
    targets = problem.constants["targets"]
    keep = p.keep_of(problem)
    ignore = -100  # ids change places, so the ignored one must not be an id
    there = replace(
        data(problem, targets=np.where(keep, place[np.where(keep, targets, 0)], ignore)),
        inputs={"logits": problem.inputs["logits"][..., order]},
        parameters={**problem.parameters, "ignore_index": ignore},
    )
    a, b = run(subject, problem), run(subject, there)
    verdicts = [apart(n, a[n], b[n], SMALL[problem.dtype]) for n in ("logp", "lse", "entropy")]
    if a["dlogits"] is not None:
        unit = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[problem.dtype]
        size = 1 + np.abs(to_array(a["dlogits"])).max(initial=0.0)
        verdicts.append(apart("dlogits", to_array(a["dlogits"])[..., order], b["dlogits"], unit * size))
    return verdicts


def impossible_appended(subject: Subject, problem: Problem) -> list[Verdict]:
    """Logits of minus infinity behind the others change nothing, and get a gradient of 0."""
    z = problem.inputs["logits"]
    wide = changed(problem, logits=np.concatenate([z, np.full((*z.shape[:-1], 19), -np.inf)], -1))
    a, b = run(subject, problem), run(subject, wide)
    verdicts = [apart(n, a[n], b[n], SMALL[problem.dtype]) for n in ("logp", "lse", "entropy")]
    if b["dlogits"] is not None:
        verdicts.append(Verdict("their gradient", int((b["dlogits"][..., z.shape[-1] :] != 0).sum()), 0.0))
    return verdicts


def doubled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Every column twice: LSE and entropy grow by log 2, log-probs fall by it."""
    z = problem.inputs["logits"]
    twice = changed(problem, logits=np.concatenate([z, z], -1))
    a, b = run(subject, problem, False), run(subject, twice, False)
    step = np.where(p.keep_of(problem), np.log(2.0), 0.0)
    return [
        apart(name, to_array(a[name]) + sign * step, b[name], SMALL[problem.dtype])
        for name, sign in (("lse", 1), ("entropy", 1), ("logp", -1))
    ]


def gradient_sums(subject: Subject, problem: Problem) -> list[Verdict]:
    """Cross-entropy's gradient sums to 0 over the vocabulary; the target's lies in [-w, 0], the others' in [0, w]."""
    problem = with_(problem, z_loss=0.0, label_smoothing=0.0, reduction="sum")
    dz = to_array(run(subject, problem)["dlogits"])
    unit = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[problem.dtype] * float(problem.cotangents["loss"])
    keep, w = p.keep_of(problem), float(problem.cotangents["loss"])
    ids = np.where(keep, problem.constants["targets"], 0)
    at = np.take_along_axis(dz, ids[..., None], -1)[..., 0]
    rest = dz.copy()
    np.put_along_axis(rest, ids[..., None], 0.0, -1)
    outside = np.maximum(np.maximum(at, -w - at), np.maximum((-rest).max(-1), rest.max(-1) - w))
    return [
        within("sum", np.atleast_1d(np.abs(dz.sum(-1))), unit * np.sqrt(dz.shape[-1])),
        within("range", np.atleast_1d(np.maximum(outside, 0)), unit),
    ]


def smoothing_linear(subject: Subject, problem: Problem) -> list[Verdict]:
    """The loss is linear in the smoothing: half way between none and all is the mean of the two."""
    losses = [float(run(subject, with_(problem, label_smoothing=e), False)["loss"]) for e in (0.0, 0.5, 1.0)]
    size = max(np.abs(losses).max(), 1.0)
    return [apart("loss", losses[1], (losses[0] + losses[2]) / 2, 1e-5 * size)]


def arriving_scaled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Four times what arrives is four times the gradient, bit by bit (where float16 does not run out of exponents)."""
    name = "d" + p.inputs_of(problem.function)[0]
    big = {n: None if c is None else 4 * c for n, c in problem.cotangents.items()}
    a, b = run(subject, problem)[name], run(subject, replace(problem, cotangents=big))[name]
    normal = (a.abs() > 2.0**-12) & (a.abs() < 2.0**12)
    return [equal(name, [((4 * a)[normal], b[normal])])]


def tempered(subject: Subject, problem: Problem) -> list[Verdict]:
    """Temperature 1/2 of z is temperature 1 of 2 z, bit by bit; the gradient is twice as large."""
    a = run(subject, with_(problem, temperature=0.5))
    b = run(subject, with_(changed(problem, logits=2 * problem.inputs["logits"]), temperature=1.0))
    verdicts = [equal("statistics", [(a[n], b[n]) for n in ("logp", "lse", "entropy")])]
    if a["dlogits"] is not None:
        normal = a["dlogits"].abs() > 2.0**-12
        verdicts.append(equal("dlogits", [(a["dlogits"][normal], (2 * b["dlogits"])[normal])]))
    return verdicts


# ---- between functions


def same_statistics(subject: Subject, problem: Problem) -> list[Verdict]:
    """The policy loss reports the statistics of `token_logprobs`, bit by bit."""
    keep = p.keep_of(problem)
    alone = replace(
        problem, function=("linear_" if problem.function in p.LINEAR else "") + "token_logprobs",
        constants={"targets": np.where(keep, problem.constants["targets"], problem.parameters["ignore_index"])},
        parameters={n: problem.parameters[n] for n in ("temperature", "ignore_index")},
        cotangents={n: np.zeros(keep.shape) for n in ("logp", "lse", "entropy")},
    )  # fmt: skip
    if alone.function not in subject.functions:
        return []
    a, b = run(subject, problem, False), run(subject, alone, False)
    return [equal("statistics", [(a[n], b[n]) for n in ("logp", "lse", "entropy")])]


def shards_add(subject: Subject, problem: Problem) -> list[Verdict]:
    """The head's gradient of a sum of losses adds over groups of rows."""
    problem = with_(problem, reduction="sum", label_smoothing=0.0)
    x, t = problem.inputs["hidden"], problem.constants["targets"]
    x, t = x.reshape(-1, x.shape[-1]), t.reshape(-1)
    cut = (len(x) + 1) // 2
    parts = [
        to_array(run(subject, data(changed(problem, hidden=x[part]), targets=t[part]))["dweight"])
        for part in (slice(None), slice(cut), slice(cut, None))
    ]
    unit = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[problem.dtype]
    return [apart("dweight", parts[0], parts[1] + parts[2], unit * (1 + np.abs(parts[0]).max()))]


def linear_then_loss(subject: Subject, problem: Problem) -> list[Verdict]:
    """On small integers, where logits are exact: the fused form reports what the dense one does."""
    dense = problem.function.removeprefix("linear_")
    if dense not in subject.functions:
        return []
    weight = np.round(problem.inputs["weight"] * 3)
    exact = changed(problem, weight=weight)
    logits = np.where(p.keep_of(problem)[..., None], p.logits_of(exact), 0.0)
    there = replace(exact, function=dense, inputs={"logits": logits})
    a, b = run(subject, exact, False), run(subject, there, False)
    return [apart(n, a[n], b[n], 1e-5 * (1 + np.abs(to_array(b[n])))) for n in p.outputs_of(dense) if n not in ("ratio", "k1", "k2", "k3")]  # fmt: skip


STATISTICS, CE, POLICY = ("token_logprobs",), ("cross_entropy",), ("policy_loss",)
RELATIONS = (
    relation("shift-invariance", STATISTICS, shifted, kinds=("integers",)),
    relation("normalised", ("softmax", "token_logprobs"), normalised),
    relation("vocabulary-permutes", STATISTICS, vocabulary_permuted, kinds=p.TAME),
    relation("impossible-appended", STATISTICS, impossible_appended, kinds=p.TAME),
    relation("columns-doubled", STATISTICS, doubled, kinds=p.TAME),
    relation("gradient-sums-to-zero", CE, gradient_sums, gradient=True, kinds=p.TAME),
    relation("smoothing-linear", CE, smoothing_linear, kinds=p.TAME),
    relation("arriving-scales", (*CE, "linear_cross_entropy", *POLICY), arriving_scaled, gradient=True, kinds=p.TAME),
    relation("temperature", STATISTICS, tempered, kinds=p.TAME),
    relation("same-statistics", p.POLICY, same_statistics),
    relation("shards-add", ("linear_cross_entropy",), shards_add, gradient=True, kinds=("normal",)),
    relation("linear-then-loss", p.LINEAR, linear_then_loss, kinds=("integers",)),
)
