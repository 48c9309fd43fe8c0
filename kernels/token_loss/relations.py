"""Relations that need no reference: of softmax and likelihood, and of the clipped policy losses."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels.problem import Problem, to_array
from kernels.property import Property
from kernels.subject import Run, Subject, equal, execute
from kernels.token_loss import problems as p
from kernels.tolerance import Verdict
from kernels.universal import changed, within

SMALL = {"float32": 2e-5, "float16": 2e-5, "bfloat16": 2e-5}  # of float32 statistics of tame logits, a few units at 8


def _named(run: Run, problem: Problem) -> dict[str, torch.Tensor]:
    return dict(zip(p.result_names(problem.function), [*run.outputs, *run.gradients]))


def _run(subject: Subject, problem: Problem, gradients: bool = True) -> dict[str, Any]:
    return _named(execute(subject, problem, gradients), problem)


def _with(problem: Problem, **parameters: Any) -> Problem:
    return replace(problem, parameters={**problem.parameters, **parameters})


def _data(problem: Problem, **constants: Any) -> Problem:
    return replace(problem, constants={**problem.constants, **constants})


def _apart(name: str, a: Any, b: Any, allowed: Any) -> Verdict:
    a, b = (to_array(x) if isinstance(x, torch.Tensor) else np.asarray(x) for x in (a, b))
    return within(name, np.atleast_1d(np.abs(a - b)), allowed)


# ---- softmax and likelihood


def shifted(subject: Subject, problem: Problem) -> list[Verdict]:
    """One number added to all logits of a row (exactly) changes no bit of log-prob, entropy and gradient; LSE moves by it."""
    moved = changed(problem, logits=problem.inputs["logits"] + 1024.0)
    a, b = _run(subject, problem), _run(subject, moved)
    shift = np.where(p.keep_of(problem), 1024.0 / problem.parameters["temperature"], 0.0)
    names = ("logp", "entropy")
    if subject.ours:
        return [equal("log-prob and entropy", [(a[n], b[n]) for n in names]),
                _apart("lse", to_array(a["lse"]) + shift, b["lse"], 5e-4)]  # fmt: skip
    return [_apart(n, a[n], b[n], 1e-3) for n in names]


def normalised(subject: Subject, problem: Problem) -> list[Verdict]:
    """Probabilities sum to 1; LSE is at least the largest logit; the entropy lies between 0 and log V."""
    found = _run(subject, problem, gradients=False)
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
        _data(problem, targets=np.where(keep, place[np.where(keep, targets, 0)], ignore)),
        inputs={"logits": problem.inputs["logits"][..., order]},
        parameters={**problem.parameters, "ignore_index": ignore},
    )
    a, b = _run(subject, problem), _run(subject, there)
    verdicts = [_apart(n, a[n], b[n], SMALL[problem.dtype]) for n in ("logp", "lse", "entropy")]
    if a["dlogits"] is not None:
        unit = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[problem.dtype]
        size = 1 + np.abs(to_array(a["dlogits"])).max(initial=0.0)
        verdicts.append(_apart("dlogits", to_array(a["dlogits"])[..., order], b["dlogits"], unit * size))
    return verdicts


def impossible_appended(subject: Subject, problem: Problem) -> list[Verdict]:
    """Logits of minus infinity behind the others change nothing, and get a gradient of 0."""
    z = problem.inputs["logits"]
    wide = changed(problem, logits=np.concatenate([z, np.full((*z.shape[:-1], 19), -np.inf)], -1))
    a, b = _run(subject, problem), _run(subject, wide)
    verdicts = [_apart(n, a[n], b[n], SMALL[problem.dtype]) for n in ("logp", "lse", "entropy")]
    if b["dlogits"] is not None:
        verdicts.append(Verdict("their gradient", int((b["dlogits"][..., z.shape[-1] :] != 0).sum()), 0.0))
    return verdicts


def doubled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Every column twice: LSE and entropy grow by log 2, log-probs fall by it."""
    z = problem.inputs["logits"]
    twice = changed(problem, logits=np.concatenate([z, z], -1))
    a, b = _run(subject, problem, False), _run(subject, twice, False)
    step = np.where(p.keep_of(problem), np.log(2.0), 0.0)
    return [
        _apart(name, to_array(a[name]) + sign * step, b[name], SMALL[problem.dtype])
        for name, sign in (("lse", 1), ("entropy", 1), ("logp", -1))
    ]


def gradient_sums(subject: Subject, problem: Problem) -> list[Verdict]:
    """Cross-entropy's gradient sums to 0 over the vocabulary; the target's lies in [-w, 0], the others' in [0, w]."""
    problem = _with(problem, z_loss=0.0, label_smoothing=0.0, reduction="sum")
    dz = to_array(_run(subject, problem)["dlogits"])
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
    losses = [float(_run(subject, _with(problem, label_smoothing=e), False)["loss"]) for e in (0.0, 0.5, 1.0)]
    size = max(np.abs(losses).max(), 1.0)
    return [_apart("loss", losses[1], (losses[0] + losses[2]) / 2, 1e-5 * size)]


def arriving_scaled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Four times what arrives is four times the gradient, bit by bit (where float16 does not run out of exponents)."""
    name = "d" + p.inputs_of(problem.function)[0]
    big = {n: None if c is None else 4 * c for n, c in problem.cotangents.items()}
    a, b = _run(subject, problem)[name], _run(subject, replace(problem, cotangents=big))[name]
    normal = (a.abs() > 2.0**-12) & (a.abs() < 2.0**12)
    return [equal(name, [((4 * a)[normal], b[normal])])]


def tempered(subject: Subject, problem: Problem) -> list[Verdict]:
    """Temperature 1/2 of z is temperature 1 of 2 z, bit by bit; the gradient is twice as large."""
    a = _run(subject, _with(problem, temperature=0.5))
    b = _run(subject, _with(changed(problem, logits=2 * problem.inputs["logits"]), temperature=1.0))
    verdicts = [equal("statistics", [(a[n], b[n]) for n in ("logp", "lse", "entropy")])]
    if a["dlogits"] is not None:
        normal = a["dlogits"].abs() > 2.0**-12
        verdicts.append(equal("dlogits", [(a["dlogits"][normal], (2 * b["dlogits"])[normal])]))
    return verdicts


# ---- policies


def _as_current(subject: Subject, problem: Problem, **more: Any) -> Problem:
    """The problem with old (and reference) log-probs equal to the current ones, bit by bit."""
    logp = _run(subject, problem, False)["logp"].cpu().numpy().astype(np.float32)
    return _data(problem, old_logprobs=logp, ref_logprobs=logp, **more)


def on_policy(subject: Subject, problem: Problem) -> list[Verdict]:
    """Old = reference = current: ratio 1, nothing clipped, k1 = k2 = k3 = 0, and the loss is minus the weighted advantages."""
    problem = _as_current(subject, _with(problem, entropy_coef=0.0))
    found = _run(subject, problem)
    keep = p.keep_of(problem)
    verdicts = [
        Verdict("ratio", int((to_array(found["ratio"])[keep] != 1).sum()), 0.0),
        Verdict("clipped", int((found["clipped"] != 0).sum()), 0.0),
        *(Verdict(k, int((found[k] != 0).sum()), 0.0) for k in ("k1", "k2", "k3")),
    ]
    if found[_first(problem)] is not None:  # the policy gradient: that of -w A log p, without any clip
        plain = _with(problem, clip_low=1.0, clip_high=1e6, dual_clip=None, beta=0.0)
        others = problem.parameters["beta"] and problem.parameters["kl"] == "k1"
        if not others:
            verdicts.append(_apart(_first(problem), found[_first(problem)], _run(subject, plain)[_first(problem)], 0.0))
    return verdicts


def _first(problem: Problem) -> str:
    return "d" + p.inputs_of(problem.function)[0]


def clipped_are_still(subject: Subject, problem: Problem) -> list[Verdict]:
    """Without penalties: exactly 0 gradient where the flag is set, some where it is not and the advantage is not 0."""
    problem = _with(problem, beta=0.0, entropy_coef=0.0, level="token")
    found = _run(subject, problem)
    moving = np.abs(to_array(found["dlogits"])).max(-1) > 0
    keep = p.keep_of(problem)
    a = problem.constants["advantages"]
    a = np.broadcast_to(a[:, None] if a.ndim == 1 else a, keep.shape)
    flag = to_array(found["clipped"])
    alive = keep & (flag == 0) & (np.abs(a) > 0.05)
    if problem.constants["token_weights"] is not None:
        alive &= problem.constants["token_weights"] > 0.05
    uncertain = p.log_probs(p.logits_of(problem), problem.parameters["temperature"]).max(-1) < -0.1
    return [
        Verdict("clipped and moving", int((moving & (flag != 0)).sum()), 0.0),
        Verdict("neither clipped nor moving", int((alive & uncertain & ~moving).sum()), 0.0),
    ]


def pessimistic(subject: Subject, problem: Problem) -> list[Verdict]:
    """The clipped loss is never below the unclipped one (without the dual clip, which is there to bound it)."""
    problem = _with(problem, dual_clip=None, beta=0.0, entropy_coef=0.0)
    clipped = float(_run(subject, problem, False)["loss"])
    free = float(_run(subject, _with(problem, clip_low=1.0, clip_high=1e6), False)["loss"])
    return [_apart("loss", max(free - clipped, 0.0), 0.0, 1e-5 * max(abs(free), 1.0))]


def estimators(subject: Subject, problem: Problem) -> list[Verdict]:
    """k1 is the log-ratio to the reference, k2 half its square, k3 = e^-k1 - 1 + k1 and never negative."""
    if problem.constants["ref_logprobs"] is None:
        problem = _data(problem, ref_logprobs=problem.constants["old_logprobs"])
    found = {n: to_array(t) for n, t in _run(subject, problem, False).items() if t is not None}
    keep = p.keep_of(problem)
    k1 = np.where(keep, found["logp"] - np.where(keep, problem.constants["ref_logprobs"], 0), 0)
    size = 1e-5 * np.exp(np.abs(k1)).max(initial=1.0)
    return [
        _apart("k1", found["k1"], k1, 1e-6), _apart("k2", found["k2"], k1**2 / 2, size),
        _apart("k3", found["k3"], np.expm1(-k1) + k1, size), Verdict("k3 < 0", int((found["k3"] < 0).sum()), 0.0),
    ]  # fmt: skip


def advantages_scaled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Twice the advantages, twice the surrogate (bit by bit); advantages of 0 leave the penalties only."""
    problem = _with(problem, beta=0.0, entropy_coef=0.0)
    a = problem.constants["advantages"]
    one, two, none = (
        _run(subject, _data(problem, advantages=f * a)) for f in (np.float32(1), np.float32(2), np.float32(0))
    )
    verdicts = [equal("loss", [(2 * one["loss"], two["loss"])]), Verdict("loss at 0", float(none["loss"].abs()), 0.0)]
    if none[_first(problem)] is not None:
        verdicts.append(Verdict("gradient at 0", int((none[_first(problem)] != 0).sum()), 0.0))
    return verdicts


def sequences_permuted(subject: Subject, problem: Problem) -> list[Verdict]:
    """Responses in another order: everything per token moves along, bit by bit; the loss stays."""
    order = np.random.default_rng(0).permutation(len(problem.constants["mask"]))
    name = p.inputs_of(problem.function)[0]
    moved = changed(
        replace(problem, constants={n: None if a is None else a[order] for n, a in problem.constants.items()}),
        None,
        **{name: problem.inputs[name][order]},
    )
    a, b = _run(subject, problem), _run(subject, moved)
    tokens = ("logp", "lse", "entropy", "ratio", "clipped", "k1", "k2", "k3")
    return [
        equal("tokens", [(a[n][torch.from_numpy(order).to(a[n].device)], b[n]) for n in tokens]),
        _apart("loss", a["loss"], b["loss"], 1e-5 * max(abs(float(a["loss"])), 1.0)),
    ]


def padded(subject: Subject, problem: Problem) -> list[Verdict]:
    """Tokens that are masked, appended at the right and full of NaN, change nothing."""
    B, T = problem.constants["mask"].shape
    name = p.inputs_of(problem.function)[0]
    fill = {"b": False, "i": 0, "f": np.nan}

    def longer(array):
        if array is None or array.ndim == 1:
            return array
        return np.concatenate([array, np.full((B, 3, *array.shape[2:]), fill[array.dtype.kind], array.dtype)], 1)

    wide = changed(
        replace(problem, constants={n: longer(a) for n, a in problem.constants.items()}),
        None,
        **{name: longer(problem.inputs[name])},
    )
    a, b = _run(subject, problem), _run(subject, wide)
    size = max(abs(float(a["loss"])), 1.0)
    verdicts = [
        equal("tokens", [(a[n], b[n][:, :T].contiguous()) for n in ("logp", "lse", "entropy", "clipped")]),
        _apart("loss", a["loss"], b["loss"], 1e-5 * size),
    ]
    if b[_first(problem)] is not None:
        verdicts.append(Verdict("gradient of padding", int((b[_first(problem)][:, T:] != 0).sum()), 0.0))
    return verdicts


def reductions_agree(subject: Subject, problem: Problem) -> list[Verdict]:
    """With all responses of one length T: token mean = sequence mean = constant with that length = sequence sum / T."""
    mask = np.ones_like(problem.constants["mask"])
    targets = np.where(
        problem.constants["targets"] == problem.parameters["ignore_index"], 0, problem.constants["targets"]
    )
    T = mask.shape[1]
    full = _with(_data(problem, mask=mask, targets=targets), divisor=None, length=T, ignore_index=-100)
    losses = {
        r: float(_run(subject, _with(full, reduction=r), False)["loss"]) / (T if r == "seq-sum" else 1)
        for r in ("token-mean", "seq-mean", "constant", "seq-sum")
    }
    size = max(abs(losses["token-mean"]), 1.0)
    return [_apart(r, value, losses["token-mean"], 1e-5 * size) for r, value in losses.items()]


def dual_at_infinity(subject: Subject, problem: Problem) -> list[Verdict]:
    """A dual clip that is out of reach is none, bit by bit."""
    a, b = (_run(subject, _with(problem, dual_clip=c)) for c in (None, 1e30))
    return [equal("all results", [(a[n], b[n]) for n in a if a[n] is not None])]


def extreme(subject: Subject, problem: Problem) -> list[Verdict]:
    """Log-ratios of +-80 give finite numbers."""
    problem = _with(problem, level="token", beta=0.0, kl_ratio=False)
    logp = _run(subject, problem, False)["logp"].cpu().numpy().astype(np.float32)
    old = logp + np.where(np.arange(logp.size).reshape(logp.shape) % 2, 80, -80).astype(np.float32)
    run = _run(subject, _data(problem, old_logprobs=old, ref_logprobs=old))
    return [Verdict("not finite", sum(int((~torch.isfinite(t)).sum()) for t in run.values() if t is not None), 0.0)]


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
    a, b = _run(subject, problem, False), _run(subject, alone, False)
    return [equal("statistics", [(a[n], b[n]) for n in ("logp", "lse", "entropy")])]


def shards_add(subject: Subject, problem: Problem) -> list[Verdict]:
    """The head's gradient of a sum of losses adds over groups of rows."""
    problem = _with(problem, reduction="sum", label_smoothing=0.0)
    x, t = problem.inputs["hidden"], problem.constants["targets"]
    x, t = x.reshape(-1, x.shape[-1]), t.reshape(-1)
    cut = (len(x) + 1) // 2
    parts = [
        to_array(_run(subject, _data(changed(problem, hidden=x[part]), targets=t[part]))["dweight"])
        for part in (slice(None), slice(cut), slice(cut, None))
    ]
    unit = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[problem.dtype]
    return [_apart("dweight", parts[0], parts[1] + parts[2], unit * (1 + np.abs(parts[0]).max()))]


def linear_then_loss(subject: Subject, problem: Problem) -> list[Verdict]:
    """On small integers, where logits are exact: the fused form reports what the dense one does."""
    dense = problem.function.removeprefix("linear_")
    if dense not in subject.functions:
        return []
    weight = np.round(problem.inputs["weight"] * 3)
    exact = changed(problem, weight=weight)
    logits = np.where(p.keep_of(problem)[..., None], p.logits_of(exact), 0.0)
    there = replace(exact, function=dense, inputs={"logits": logits})
    a, b = _run(subject, exact, False), _run(subject, there, False)
    return [_apart(n, a[n], b[n], 1e-5 * (1 + np.abs(to_array(b[n])))) for n in p.outputs_of(dense) if n not in ("ratio", "k1", "k2", "k3")]  # fmt: skip


def _draw(**options: Any):
    options = {"layouts": False, "dirty": False, **options}
    return lambda function, dtype, gpu: p.problems(function, dtype, gpu, **options)


def _relation(name: str, functions: tuple[str, ...], check, gradient: bool = False, share: float = 0.25, **options):
    return Property(name, functions, _draw(**options), check, gradient=gradient, share=share)


STATISTICS, CE, POLICY = ("token_logprobs",), ("cross_entropy",), ("policy_loss",)
RELATIONS = (
    _relation("shift-invariance", STATISTICS, shifted, kinds=("integers",)),
    _relation("normalised", ("softmax", "token_logprobs"), normalised),
    _relation("vocabulary-permutes", STATISTICS, vocabulary_permuted, kinds=p.TAME),
    _relation("impossible-appended", STATISTICS, impossible_appended, kinds=p.TAME),
    _relation("columns-doubled", STATISTICS, doubled, kinds=p.TAME),
    _relation("gradient-sums-to-zero", CE, gradient_sums, gradient=True, kinds=p.TAME),
    _relation("smoothing-linear", CE, smoothing_linear, kinds=p.TAME),
    _relation("arriving-scales", (*CE, "linear_cross_entropy", *POLICY), arriving_scaled, gradient=True, kinds=p.TAME),
    _relation("temperature", STATISTICS, tempered, kinds=p.TAME),
    _relation("on-policy", p.POLICY, on_policy),
    _relation("clipped-are-still", POLICY, clipped_are_still, gradient=True, switches={"level": "token"}),
    _relation("pessimism", POLICY, pessimistic),
    _relation("estimators", POLICY, estimators),
    _relation("advantages-scale", POLICY, advantages_scaled),
    _relation("sequences-permute", POLICY, sequences_permuted),
    _relation("padding", p.POLICY, padded, switches={"reduction": "token-mean"}),
    _relation("reductions-agree", POLICY, reductions_agree),
    _relation("dual-clip-at-infinity", POLICY, dual_at_infinity),
    _relation("extreme-ratios", POLICY, extreme),
    _relation("same-statistics", p.POLICY, same_statistics),
    _relation("shards-add", ("linear_cross_entropy",), shards_add, gradient=True, kinds=("normal",)),
    _relation("linear-then-loss", p.LINEAR, linear_then_loss, kinds=("integers",)),
)
