"""Where rounding errors of each result come from: the largest summands, for the tolerance rule."""

import numpy as np

from kernels.problem import Problem
from kernels.token_loss import problems as p
from kernels.tolerance import SPACING, Scale
from minillm.functional.reductions import aggregation_weights


def scales(problem: Problem) -> list[Scale]:
    """The largest summand behind each output and gradient, in order of `problems.result_names`."""
    keep = p.keep_of(problem)
    z = np.where(keep[..., None], p.logits_of(problem), 0.0)
    tau = problem.parameters.get("temperature", 1.0)
    V = z.shape[-1]
    if problem.function in p.LINEAR:
        V += problem.inputs["weight"].shape[1]
    size = _size(problem, keep) / tau  # (..., 1)
    if problem.function in p.ROWS_ONLY:
        arriving = np.abs(problem.cotangents["y"]).max(-1, keepdims=True, initial=0.0)
        of_y = np.maximum(size, 1.0)
        return [Scale(of_y, V), Scale(arriving * of_y, V)]
    column = _over_rows(size)
    outputs = {name: _scale(column * _watched(problem, name, size), V) for name in p.outputs_of(problem.function)}
    if "loss" in outputs:
        outputs["loss"] = Scale(
            np.max(column, initial=0.0) * max(token_weights(problem, keep).sum(), 1.0), V, by_row=False
        )
    slope = _slope(problem, keep, size[..., 0]) / tau  # (...), of one logit
    found = {**outputs, **_gradients(problem, keep, slope, size, V)}
    return [found[name] for name in p.result_names(problem.function)]


def _size(problem: Problem, keep: np.ndarray) -> np.ndarray:
    """The largest summand of a logit or logit of a row, at least 1, (..., 1)."""
    if problem.function in p.LINEAR:
        hidden = np.where(keep[..., None], np.abs(problem.inputs["hidden"]), 0.0)
        found = (hidden @ np.abs(problem.inputs["weight"]).T).max(-1, keepdims=True, initial=0.0)
    else:
        z = np.where(keep[..., None], problem.inputs["logits"], 0.0)
        found = np.where(np.isfinite(z), np.abs(z), 0.0).max(-1, keepdims=True, initial=0.0)
    return np.maximum(found, 1.0)


def _over_rows(size: np.ndarray) -> np.ndarray:
    """The same for the last axis of a per-token result: (..., 1), or a number for a single row."""
    return size[..., 0].max(-1, keepdims=True, initial=0.0) if size.ndim > 1 else size[0]


def _scale(summand: np.ndarray, count: int) -> Scale:
    return Scale(summand, count, by_row=np.ndim(summand) > 0)


def _watched(problem: Problem, name: str, size: np.ndarray) -> np.ndarray | float:
    """How much an error of a log-prob is magnified in a result made of it."""
    if problem.function in p.POLICY and name != "loss":
        keep = p.keep_of(problem)
        logp = np.where(keep, p._chosen(problem, np.where(keep, problem.constants["targets"], 0)), 0.0)
        ratio = np.exp(p.log_ratios(problem, logp, keep)).max()
        ref = problem.constants["ref_logprobs"]
        d = np.abs(np.where(keep, ref - logp, 0.0)).max() if ref is not None else 0.0
        length = keep.shape[-1] if problem.parameters["level"] == "sequence" else 1
        return {"ratio": ratio * length, "k2": 1 + d, "k3": np.exp(d)}.get(name, 1.0)
    return 1.0


def _slope(problem: Problem, keep: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A bound on |a| + |b| (...) + |c| + |d| of every row: what the gradient of a logit is made of."""
    V = p.logits_of(problem).shape[-1]
    deep = 2 * size + np.log(V)  # of log p
    if problem.function in p.STATISTICS:
        c = problem.cotangents
        return np.where(keep, np.abs(c["logp"]) + np.abs(c["lse"]) + np.abs(c["entropy"]) * 2 * deep, 0.0)
    arriving = abs(float(problem.cotangents["loss"]))
    weight = token_weights(problem, keep)
    if problem.function in p.LIKELIHOOD:
        return arriving * weight * (1 + 2 * problem.parameters["z_loss"] * deep)
    logp = np.where(keep, p._chosen(problem, np.where(keep, problem.constants["targets"], 0)), 0.0)
    constants, parameters = problem.constants, problem.parameters
    ratio = np.exp(p.log_ratios(problem, logp, keep))
    a = constants["advantages"]
    a = np.where(keep, np.broadcast_to(a[:, None] if a.ndim == 1 else a, keep.shape), 0.0)
    pull = ratio * np.abs(a) * (2.0 if constants["token_weights"] is not None else 1.0)
    if parameters["level"] != "token":
        pull = np.broadcast_to(pull.sum(-1, keepdims=True), keep.shape)
    if constants["ref_logprobs"] is not None and parameters["beta"]:
        d = np.where(keep, constants["ref_logprobs"] - logp, 0.0)
        k = parameters["beta"] * (2 + np.abs(d) + d * d + np.exp(d))
        pull = pull + k * (
            np.exp(np.where(keep, logp - constants["old_logprobs"], 0.0)) if parameters["kl_ratio"] else 1
        )
    return arriving * weight * (pull + parameters["entropy_coef"] * 2 * deep)


def token_weights(problem: Problem, keep: np.ndarray) -> np.ndarray:
    """The weight of every token in the loss."""
    parameters = problem.parameters
    if problem.function in p.LIKELIHOOD:
        if parameters["reduction"] == "sum":
            return keep.astype(float)
        return keep / (max(keep.sum(), 1) if parameters["divisor"] is None else parameters["divisor"])
    return aggregation_weights(
        keep, parameters["reduction"], length=parameters["length"], divisor=parameters["divisor"]
    )


def _gradients(problem: Problem, keep, slope, size, V) -> dict[str, Scale]:
    if problem.function not in p.LINEAR:
        return {"dlogits": Scale(slope[..., None] * size, V)}
    # The logits' gradient is rounded to the operands' dtype before the two products: as many units as that is coarser.
    coarser = SPACING[problem.dtype] / SPACING["float32"]
    hidden = np.where(keep[..., None], problem.inputs["hidden"], 0.0)
    of_dz = slope[..., None] * np.maximum(size, coarser)
    weight = np.abs(problem.inputs["weight"]).max()
    into = (of_dz * np.abs(hidden).max(-1, keepdims=True, initial=0.0)).max(initial=0.0)
    return {"dhidden": Scale(of_dz * weight, V), "dweight": Scale(into, max(keep.size, 1), by_row=False)}
