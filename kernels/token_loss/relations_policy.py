"""Relations that need no reference: of the clipped policy losses."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels.problem import Problem, to_array
from kernels.subject import Subject, equal
from kernels.token_loss import problems as p
from kernels.token_loss.relating import apart, data, first, relation, run, with_
from kernels.tolerance import Verdict
from kernels.universal import changed


def _as_current(subject: Subject, problem: Problem, **more: Any) -> Problem:
    """The problem with old (and reference) log-probs equal to the current ones, bit by bit."""
    logp = run(subject, problem, False)["logp"].cpu().numpy().astype(np.float32)
    return data(problem, old_logprobs=logp, ref_logprobs=logp, **more)


def on_policy(subject: Subject, problem: Problem) -> list[Verdict]:
    """Old = reference = current: ratio 1, nothing clipped, k1 = k2 = k3 = 0, and the loss is minus the weighted advantages."""
    problem = _as_current(subject, with_(problem, entropy_coef=0.0))
    found = run(subject, problem)
    keep = p.keep_of(problem)
    verdicts = [
        Verdict("ratio", int((to_array(found["ratio"])[keep] != 1).sum()), 0.0),
        Verdict("clipped", int((found["clipped"] != 0).sum()), 0.0),
        *(Verdict(k, int((found[k] != 0).sum()), 0.0) for k in ("k1", "k2", "k3")),
    ]
    if found[first(problem)] is not None:  # the policy gradient: that of -w A log p, without any clip
        plain = with_(problem, clip_low=1.0, clip_high=1e6, dual_clip=None, beta=0.0)
        others = problem.parameters["beta"] and problem.parameters["kl"] == "k1"
        if not others:
            verdicts.append(apart(first(problem), found[first(problem)], run(subject, plain)[first(problem)], 0.0))
    return verdicts


def clipped_are_still(subject: Subject, problem: Problem) -> list[Verdict]:
    """Without penalties: exactly 0 gradient where the flag is set, some where it is not and the advantage is not 0."""
    problem = with_(problem, beta=0.0, entropy_coef=0.0, level="token")
    found = run(subject, problem)
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
    problem = with_(problem, dual_clip=None, beta=0.0, entropy_coef=0.0)
    clipped = float(run(subject, problem, False)["loss"])
    free = float(run(subject, with_(problem, clip_low=1.0, clip_high=1e6), False)["loss"])
    return [apart("loss", max(free - clipped, 0.0), 0.0, 1e-5 * max(abs(free), 1.0))]


def estimators(subject: Subject, problem: Problem) -> list[Verdict]:
    """k1 is the log-ratio to the reference, k2 half its square, k3 = e^-k1 - 1 + k1 and never negative."""
    if problem.constants["ref_logprobs"] is None:
        problem = data(problem, ref_logprobs=problem.constants["old_logprobs"])
    found = {n: to_array(t) for n, t in run(subject, problem, False).items() if t is not None}
    keep = p.keep_of(problem)
    k1 = np.where(keep, found["logp"] - np.where(keep, problem.constants["ref_logprobs"], 0), 0)
    size = 1e-5 * np.exp(np.abs(k1)).max(initial=1.0)
    return [
        apart("k1", found["k1"], k1, 1e-6), apart("k2", found["k2"], k1**2 / 2, size),
        apart("k3", found["k3"], np.expm1(-k1) + k1, size), Verdict("k3 < 0", int((found["k3"] < 0).sum()), 0.0),
    ]  # fmt: skip


def advantages_scaled(subject: Subject, problem: Problem) -> list[Verdict]:
    """Twice the advantages, twice the surrogate (bit by bit); advantages of 0 leave the penalties only."""
    problem = with_(problem, beta=0.0, entropy_coef=0.0)
    a = problem.constants["advantages"]
    one, two, none = (
        run(subject, data(problem, advantages=f * a)) for f in (np.float32(1), np.float32(2), np.float32(0))
    )
    verdicts = [equal("loss", [(2 * one["loss"], two["loss"])]), Verdict("loss at 0", float(none["loss"].abs()), 0.0)]
    if none[first(problem)] is not None:
        verdicts.append(Verdict("gradient at 0", int((none[first(problem)] != 0).sum()), 0.0))
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
    a, b = run(subject, problem), run(subject, moved)
    tokens = ("logp", "lse", "entropy", "ratio", "clipped", "k1", "k2", "k3")
    return [
        equal("tokens", [(a[n][torch.from_numpy(order).to(a[n].device)], b[n]) for n in tokens]),
        apart("loss", a["loss"], b["loss"], 1e-5 * max(abs(float(a["loss"])), 1.0)),
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
    a, b = run(subject, problem), run(subject, wide)
    size = max(abs(float(a["loss"])), 1.0)
    verdicts = [
        equal("tokens", [(a[n], b[n][:, :T].contiguous()) for n in ("logp", "lse", "entropy", "clipped")]),
        apart("loss", a["loss"], b["loss"], 1e-5 * size),
    ]
    if b[first(problem)] is not None:
        verdicts.append(Verdict("gradient of padding", int((b[first(problem)][:, T:] != 0).sum()), 0.0))
    return verdicts


def reductions_agree(subject: Subject, problem: Problem) -> list[Verdict]:
    """With all responses of one length T: token mean = sequence mean = constant with that length = sequence sum / T."""
    mask = np.ones_like(problem.constants["mask"])
    targets = np.where(
        problem.constants["targets"] == problem.parameters["ignore_index"], 0, problem.constants["targets"]
    )
    T = mask.shape[1]
    full = with_(data(problem, mask=mask, targets=targets), divisor=None, length=T, ignore_index=-100)
    losses = {
        r: float(run(subject, with_(full, reduction=r), False)["loss"]) / (T if r == "seq-sum" else 1)
        for r in ("token-mean", "seq-mean", "constant", "seq-sum")
    }
    size = max(abs(losses["token-mean"]), 1.0)
    return [apart(r, value, losses["token-mean"], 1e-5 * size) for r, value in losses.items()]


def dual_at_infinity(subject: Subject, problem: Problem) -> list[Verdict]:
    """A dual clip that is out of reach is none, bit by bit."""
    a, b = (run(subject, with_(problem, dual_clip=c)) for c in (None, 1e30))
    return [equal("all results", [(a[n], b[n]) for n in a if a[n] is not None])]


def extreme(subject: Subject, problem: Problem) -> list[Verdict]:
    """Log-ratios of +-80 give finite numbers."""
    problem = with_(problem, level="token", beta=0.0, kl_ratio=False)
    logp = run(subject, problem, False)["logp"].cpu().numpy().astype(np.float32)
    old = logp + np.where(np.arange(logp.size).reshape(logp.shape) % 2, 80, -80).astype(np.float32)
    found = run(subject, data(problem, old_logprobs=old, ref_logprobs=old))
    return [Verdict("not finite", sum(int((~torch.isfinite(t)).sum()) for t in found.values() if t is not None), 0.0)]


POLICY = ("policy_loss",)
RELATIONS = (
    relation("on-policy", p.POLICY, on_policy),
    relation("clipped-are-still", POLICY, clipped_are_still, gradient=True, switches={"level": "token"}),
    relation("pessimism", POLICY, pessimistic),
    relation("estimators", POLICY, estimators),
    relation("advantages-scale", POLICY, advantages_scaled),
    relation("sequences-permute", POLICY, sequences_permuted),
    relation("padding", p.POLICY, padded, switches={"reduction": "token-mean"}),
    relation("reductions-agree", POLICY, reductions_agree),
    relation("dual-clip-at-infinity", POLICY, dual_at_infinity),
    relation("extreme-ratios", POLICY, extreme),
)
