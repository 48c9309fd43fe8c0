"""What the family is tried on: shapes, values, ids, masks, other policies and switches, drawn by hypothesis."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from kernels.problem import Problem, conform
from kernels.token_loss.config import LinearPlan, LinearTile, RowTile
from kernels.tolerance import rounded

IGNORE = -100
ROWS_ONLY = ("softmax", "log_softmax")
STATISTICS = ("token_logprobs", "linear_token_logprobs")
LIKELIHOOD = ("cross_entropy", "linear_cross_entropy")
POLICY = ("policy_loss", "linear_policy_loss")
DENSE = (*ROWS_ONLY, "token_logprobs", "cross_entropy", "policy_loss")
LINEAR = ("linear_token_logprobs", "linear_cross_entropy", "linear_policy_loss")
FUNCTIONS = (*DENSE, *LINEAR)

ROWS = (1, 2, 3, 5)
VOCABULARIES = (2, 3, 7, 15, 16, 17, 31, 33, 64)
WIDTHS = (8, 16, 24, 1)
ROWS_GPU = (*ROWS, 17, 300)
VOCABULARIES_GPU = (*VOCABULARIES, 257, 1000, 4096, 5000, 16_384, 16_400, 50_257, 128_256)
WIDTHS_GPU = (*WIDTHS, 64, 100, 512)
VALUES = ("integers", "normal", "equal", "huge-entry", "large", "impossible", "zeros")
TAME = ("integers", "normal", "zeros")
LAYOUTS = ("contiguous", "padded", "sliced", "transposed", "swapped", "expanded")
WEIGHT_LAYOUTS = ("contiguous", "padded", "sliced", "transposed")


def inputs_of(function: str) -> tuple[str, ...]:
    """The names of a function's differentiable operands."""
    return ("hidden", "weight") if function in LINEAR else ("logits",)


def outputs_of(function: str) -> tuple[str, ...]:
    """The names of what a function returns."""
    if function in ROWS_ONLY:
        return ("y",)
    if function in STATISTICS:
        return ("logp", "lse", "entropy")
    if function in LIKELIHOOD:
        return ("loss",)
    return ("loss", "logp", "lse", "entropy", "ratio", "clipped", "k1", "k2", "k3")


def result_names(function: str) -> tuple[str, ...]:
    """Outputs, then the gradients of the inputs."""
    return (*outputs_of(function), *("d" + name for name in inputs_of(function)))


def own_dtypes(function: str) -> dict[str, str]:
    """Results whose dtype is not the logits': statistics and losses are float32, the flag is an int8."""
    if function in ROWS_ONLY:
        return {}
    return {name: "int8" if name == "clipped" else "float32" for name in outputs_of(function)}


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
    """An array of one kind of value, exactly representable in ``dtype``."""
    normal = np.clip(rng.standard_normal(shape), -4, 4)
    if kind == "integers":
        array = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "equal":
        array = np.broadcast_to(normal[..., :1], shape).copy()
    elif kind == "huge-entry":
        array = normal
        if array.size:
            array[..., rng.integers(shape[-1])] = 1e4
    elif kind == "large":
        array = 1e4 * np.sign(normal) + 100 * normal
    elif kind == "impossible":  # logits of minus infinity, never all of a row, never the target (see `_targets`)
        array = np.where((rng.random(shape) < 0.3) & (np.arange(shape[-1]) > 0), -np.inf, normal)
    elif kind == "zeros":
        array = np.zeros(shape)
    else:
        array = normal
    return rounded(array, dtype)


def logits_of(problem: Problem) -> np.ndarray:
    """The logits in float64, untempered; the rows of linear functions multiplied out."""
    if problem.function in LINEAR:
        with np.errstate(all="ignore"):
            return problem.inputs["hidden"] @ problem.inputs["weight"].T
    return problem.inputs["logits"]


def keep_of(problem: Problem) -> np.ndarray:
    """Which rows count."""
    if problem.function in ROWS_ONLY:
        return np.ones(problem.inputs["logits"].shape[:-1], bool)
    keep = problem.constants["targets"] != problem.parameters["ignore_index"]
    return keep & problem.constants["mask"] if problem.function in POLICY else keep


def log_probs(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """log softmax in float64."""
    z = logits / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@st.composite
def problems(
    draw, function: str, dtype: str, gpu: bool, kinds: tuple[str, ...] | None = None, layouts: bool = True,
    launches: bool = False, switches: Mapping[str, Any] | None = None, dirty: bool = True, ignored: bool = True,
) -> Problem:  # fmt: skip
    """A problem for ``function``. The order of every choice is from simple to hard: that is how it shrinks.

    ``dirty`` fills some rows that do not count with NaN; ``switches`` fixes parameters.
    """
    V = draw(st.sampled_from(VOCABULARIES_GPU if gpu else VOCABULARIES))
    rows = draw(st.sampled_from(ROWS_GPU if gpu else ROWS))
    lead = (draw(st.sampled_from((2, 1, 3))), rows) if function in POLICY else draw(
        st.sampled_from(((rows,), (), (2, rows)))
    )  # fmt: skip
    kinds = kinds or (TAME if function in POLICY or function in LINEAR else VALUES)
    kind = draw(st.sampled_from(kinds))
    seed_kind = draw(st.sampled_from(("integers", "normal", "zeros")))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    chosen: dict[str, str] = {}
    inputs: dict[str, np.ndarray] = {}
    if function in LINEAR:
        d = draw(st.sampled_from(WIDTHS_GPU if gpu else WIDTHS))
        inputs = {"hidden": values(rng, (*lead, d), kind, dtype), "weight": values(rng, (V, d), "normal", dtype)}
        inputs["weight"] = rounded(inputs["weight"] / np.sqrt(d), dtype)
    else:
        inputs = {"logits": values(rng, (*lead, V), kind, dtype)}
    if layouts:
        for name in inputs:
            chosen[name] = draw(st.sampled_from(WEIGHT_LAYOUTS if name == "weight" else LAYOUTS))
        inputs = {name: conform(a, chosen[name]) for name, a in inputs.items()}
    problem = Problem(function, dtype, inputs, {}, {}, chosen, note=f"{kind} values", dtypes=own_dtypes(function))
    if function not in ROWS_ONLY:
        problem = _with_constants(draw, problem, lead, V, rng, dict(switches or {}), ignored)
    if function in POLICY:
        problem = _with_policies(draw, problem, rng, dict(switches or {}))
    problem = replace(problem, cotangents=_cotangents(problem, rng, seed_kind, lead, V))
    if layouts and function in ROWS_ONLY:
        layout = draw(st.sampled_from((*LAYOUTS, "constant")))
        problem.layouts["dy"] = layout  # type: ignore[index]
        problem.cotangents["y"] = conform(problem.cotangents["y"], layout)  # type: ignore[index]
    if dirty and function not in ROWS_ONLY and draw(st.booleans()):
        problem = soiled(problem)
    return replace(problem, launch=draw(launch_sizes(function))) if launches else problem


def soiled(problem: Problem) -> Problem:
    """The same problem with NaN in every row that does not count (where the layout can hold it)."""
    name = inputs_of(problem.function)[0]
    if problem.layouts.get(name) == "expanded":
        return problem
    keep = keep_of(problem)
    inputs = {**problem.inputs, name: np.where(keep[..., None], problem.inputs[name], np.nan)}
    constants = {
        n: np.where(keep, a, np.nan).astype(a.dtype) if a is not None and a.dtype.kind == "f" and a.shape == keep.shape else a
        for n, a in problem.constants.items()
    }  # fmt: skip
    return replace(problem, inputs=inputs, constants=constants)


def _with_constants(draw, problem, lead, V, rng, switches, ignored) -> Problem:
    share = draw(st.sampled_from((0.0, 0.3, 1.0))) if ignored else 0.0
    targets = rng.integers(0, V, lead)
    targets = np.where(rng.random(lead) < 0.2, rng.choice([0, V - 1], lead), targets)
    possible = np.isfinite(problem.inputs["logits"]) if "logits" in problem.inputs else None
    if possible is not None:  # the target is a possible token; entry 0 always is
        targets = np.where(np.take_along_axis(possible, targets[..., None], -1)[..., 0], targets, 0)
    ignore_index = IGNORE if V > 3 else draw(st.sampled_from((IGNORE, 1)))
    targets = np.where(rng.random(lead) < share, ignore_index, targets).astype(np.int64)
    parameters: dict[str, Any] = {}
    if problem.function in STATISTICS:
        parameters = {"temperature": draw(st.sampled_from((1.0, 0.5, 3.0))), "ignore_index": ignore_index}
    elif problem.function in LIKELIHOOD:
        finite = problem.note != "impossible values"
        parameters = {
            "ignore_index": ignore_index, "reduction": draw(st.sampled_from(("token-mean", "sum"))),
            "divisor": draw(st.sampled_from((None, 7.0))),
            "label_smoothing": draw(st.sampled_from((0.0, 0.1))) if finite else 0.0,
            "z_loss": draw(st.sampled_from((0.0, 1e-2))),
        }  # fmt: skip
    else:
        parameters = {"ignore_index": ignore_index}
    parameters.update({name: value for name, value in switches.items() if name in parameters})
    return replace(problem, constants={"targets": targets}, parameters=parameters)


def _with_policies(draw, problem: Problem, rng, switches) -> Problem:
    """Other policies' log-probs with ratios away from every bound, and the switches of the loss."""
    targets, ignore_index = problem.constants["targets"], problem.parameters["ignore_index"]
    shape = targets.shape
    mask = np.arange(shape[1]) < rng.integers(0, shape[1] + 1, (shape[0], 1))
    if draw(st.booleans()):
        mask = rng.random(shape) < 0.7
    parameters = {
        "clip_low": 0.2, "clip_high": draw(st.sampled_from((None, 0.28))), "dual_clip": draw(st.sampled_from((None, 3.0))),
        "level": draw(st.sampled_from(("token", "sequence", "sequence-mean"))),
        "beta": draw(st.sampled_from((0.0, 0.1))), "kl": draw(st.sampled_from(("k3", "k1", "k2"))),
        "kl_ratio": draw(st.booleans()), "entropy_coef": draw(st.sampled_from((0.0, 0.01))),
        "reduction": draw(st.sampled_from(("seq-mean", "token-mean", "seq-sum", "constant", "sum"))),
        "length": shape[1] + 2, "divisor": None, "temperature": draw(st.sampled_from((1.0, 0.7))),
        "ignore_index": ignore_index,
    }  # fmt: skip
    if parameters["reduction"] != "sum":
        parameters["divisor"] = draw(st.sampled_from((None, 5.0)))
    parameters.update(switches)
    problem = replace(problem, parameters=parameters, constants={"targets": targets, "mask": mask})
    keep = keep_of(problem)
    logp = _chosen(problem, np.where(keep, targets, 0))
    sizes = rng.choice([0, 1, 2], shape)
    gaps = np.choose(sizes, [rng.uniform(0, 0.12, shape), rng.uniform(0.35, 0.9, shape), rng.uniform(1.3, 2.0, shape)])
    gaps *= rng.choice([-1.0, 1.0], shape)
    old = (logp - gaps).astype(np.float32)
    with_ref = parameters["beta"] != 0 or draw(st.booleans())
    ref = (logp + rng.choice([0.01, 0.5], shape) * rng.standard_normal(shape)).astype(np.float32) if with_ref else None
    per_response = draw(st.booleans())
    advantages = np.round(2 * rng.standard_normal(shape[:1] if per_response else shape), 1).astype(np.float32)
    weights = rng.uniform(0, 2, shape).astype(np.float32) if draw(st.booleans()) else None
    problem = replace(problem, constants={
        "targets": targets, "old_logprobs": old, "advantages": advantages, "mask": mask, "ref_logprobs": ref,
        "token_weights": weights,
    })  # fmt: skip
    assume(_clear_of_bounds(problem, logp, keep))
    return problem


def _chosen(problem: Problem, ids: np.ndarray) -> np.ndarray:
    found = log_probs(logits_of(problem), problem.parameters["temperature"])
    return np.take_along_axis(found, ids[..., None], -1)[..., 0]


def log_ratios(problem: Problem, logp: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Log-ratios at the level asked for, (B, T) or (B, 1)."""
    gap = np.where(keep, logp - problem.constants["old_logprobs"], 0.0)
    if problem.parameters["level"] == "token":
        return gap
    total = gap.sum(-1, keepdims=True)
    return total if problem.parameters["level"] == "sequence" else total / np.maximum(keep.sum(-1, keepdims=True), 1)


def _clear_of_bounds(problem: Problem, logp: np.ndarray, keep: np.ndarray) -> bool:
    """Whether every ratio keeps a distance from every bound, so that rounding cannot carry it across."""
    p = problem.parameters
    high = p["clip_low"] if p["clip_high"] is None else p["clip_high"]
    bounds = np.log([1 - p["clip_low"], 1 + high, 3.0])
    found = log_ratios(problem, logp, keep)
    return bool(np.all(np.abs(found[..., None] - bounds) > 0.01) and np.all(np.abs(found) < 30))


def _cotangents(problem: Problem, rng, kind: str, lead: tuple[int, ...], V: int) -> dict[str, Any]:
    function = problem.function
    if function in ROWS_ONLY:
        return {"y": values(rng, (*lead, V), kind, problem.dtype)}
    if function in STATISTICS:
        return {name: values(rng, lead, kind, "float32") if lead else np.float64(1.0) * values(rng, (1,), kind, "float32")[0]
                for name in outputs_of(function)}  # fmt: skip
    loss = {"loss": np.array(rng.choice([1.0, 2.0]))}
    return {**loss, **{name: None for name in outputs_of(function)[1:]}}


@st.composite
def launch_sizes(draw, function: str):
    """Small tiles, so that short rows already cross blocks, and small strips."""
    if function not in LINEAR:
        return RowTile(draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((16, 32, 128))), 1, draw(st.sampled_from((1, 2))))  # fmt: skip
    tile = LinearTile(16, draw(st.sampled_from((16, 32))), 16, 1, 1, draw(st.sampled_from((1, 2, 8))))
    return LinearPlan(tile, tile, LinearTile(16, 16, 16, 1, 1), draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((32, 64))))  # fmt: skip
