"""What linear attention is tried on: features, values, states, drawn by hypothesis so that failures shrink to small cases."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kernels.linear_attention.config import Plan
from kernels.problem import Problem, conform
from kernels.tolerance import SPACING, Scale, rounded

FUNCTIONS = ("linear_attention", "elu1_linear_attention")
OUTPUTS = ("o", "last", "last_z")
LENGTHS = (1, 2, 3, 15, 16, 17, 33, 64)
LENGTHS_GPU = (*LENGTHS, 65, 129, 300, 1000, 4097)
WIDTHS = (1, 3, 8, 16, 17, 24)
WIDTHS_GPU = (*WIDTHS, 40, 64, 80, 128)
LAYOUTS = ("contiguous", "padded", "sliced", "transposed", "swapped", "expanded")
SINGLE = {
    name: "float32" for name in ("state", "normaliser", "last", "last_z", "dstate", "dnormaliser", "dlast", "dlast_z")
}
EPS = 1e-6


def names_of(function: str) -> tuple[str, ...]:
    """The inputs of a function."""
    return ("q", "k", "v", "state", "normaliser")


def result_names(function: str) -> tuple[str, ...]:
    """Outputs, then the gradients of the inputs."""
    return (*OUTPUTS, *("d" + name for name in names_of(function)))


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
    """An array of one kind of value, exactly representable in ``dtype``."""
    array = np.clip(rng.standard_normal(shape), -4, 4)
    if kind == "integers":
        array = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "positive":  # what a feature map gives
        array = rng.uniform(0.1, 2.0, shape)
    elif kind == "ones":
        array = np.ones(shape)
    elif kind == "small":
        array = rng.uniform(1e-3, 2e-3, shape)
    elif kind == "big":
        array = rng.uniform(10.0, 30.0, shape)
    elif kind == "zeros":
        array = np.zeros(shape)
    return rounded(array, dtype)


@st.composite
def problems(
    draw, function: str, dtype: str, gpu: bool, layouts: bool = True, launches: bool = False, smooth: bool = False
) -> Problem:
    """A problem. Every choice goes from simple to hard: that is how it shrinks."""
    B, H, L = (
        draw(st.sampled_from((1, 2))),
        draw(st.sampled_from((1, 2))),
        draw(st.sampled_from(LENGTHS_GPU if gpu else LENGTHS)),
    )
    d_phi, d_v = (draw(st.sampled_from(WIDTHS_GPU if gpu else WIDTHS)) for _ in range(2))
    elu = function == "elu1_linear_attention"
    kind = draw(
        st.sampled_from(("normal",) if elu else ("positive",) if smooth else ("positive", "ones", "small", "big"))
    )
    kind_v = draw(st.sampled_from(("normal",) if smooth else ("integers", "normal", "zeros")))
    kind_d = draw(st.sampled_from(("normal",) if smooth else ("integers", "normal", "zeros")))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    arrays = {
        "q": values(rng, (B, H, L, d_phi), kind, dtype),
        "k": values(rng, (B, H, L, d_phi), kind, dtype),
        "v": values(rng, (B, H, L, d_v), kind_v, dtype),
        "state": values(rng, (B, H, d_phi, d_v), "normal", "float32"),
        "normaliser": values(rng, (B, H, d_phi), "positive", "float32"),
    }
    seeds = {
        "o": values(rng, (B, H, L, d_v), kind_d, dtype),
        "last": values(rng, (B, H, d_phi, d_v), kind_d, "float32"),
        "last_z": values(rng, (B, H, d_phi), kind_d, "float32"),
    }
    chosen = {name: draw(st.sampled_from(LAYOUTS)) for name in (*arrays, "do", "dlast")} if layouts else {}
    if chosen.get("normaliser") == "swapped":
        chosen["normaliser"] = "contiguous"
    return Problem(
        function, dtype, {name: conform(a, chosen.get(name, "")) for name, a in arrays.items()},
        {name: conform(a, chosen.get("d" + name, "")) for name, a in seeds.items()}, {"eps": draw(st.sampled_from((EPS, 0.5)))},
        chosen, draw(plans()) if launches else None, f"{kind} features", {}, SINGLE,
    )  # fmt: skip


@st.composite
def plans(draw) -> Plan:
    """Small chunks, several segments and blocks of columns, so that short sequences already cross all of them."""
    return Plan(
        draw(st.sampled_from((16, 32))), draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((16, 32))), 1,
        draw(st.sampled_from((1, 2))),
    )  # fmt: skip


def features(x: np.ndarray, function: str) -> np.ndarray:
    """What the function makes of queries and keys."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) if function == "elu1_linear_attention" else x


def scales(problem: Problem) -> list[Scale]:
    """The largest sums of magnitudes behind each result, in order: where rounding errors come from.

    16-bit products round their factors: features (of ELU + 1), products inside a chunk, states and what arrives. Each such
    rounding moves a result by half a spacing of the sum of the magnitudes behind it, at most; five of them in a row are
    behind a gradient.
    """
    i, c = problem.inputs, problem.cotangents
    q, k = (np.abs(features(i[name], problem.function)) for name in ("q", "k"))
    v, state, z = np.abs(i["v"]), np.abs(i["state"]), np.abs(i["normaliser"])
    do, d_last, d_z = (np.abs(c[name]) for name in OUTPUTS)
    sums = state[:, :, None] + np.cumsum(k[..., None] * v[..., None, :], axis=2)  # (B, H, L, d_phi, d_v)
    norms = z[:, :, None] + np.cumsum(k, axis=2)  # (B, H, L, d_phi)
    den = (q * norms).sum(-1, keepdims=True) + problem.parameters["eps"]
    o = np.einsum("bhlm,bhlmv->bhlv", q, sums) / den
    g = do / den
    reaching = (g * o).sum(-1, keepdims=True)  # bound of |c|, with o's own magnitudes
    behind = d_last[:, :, None] + np.cumsum((q[..., None] * g[..., None, :])[:, :, ::-1], axis=2)[:, :, ::-1]
    weights = d_z[:, :, None] + np.cumsum((q * reaching)[:, :, ::-1], axis=2)[:, :, ::-1]
    found = {
        "o": o, "last": state + np.einsum("bhlm,bhlv->bhmv", k, v), "last_z": z + k.sum(2),
        "dq": np.einsum("bhlmv,bhlv->bhlm", sums, g) + norms * reaching,
        "dk": np.einsum("bhlmv,bhlv->bhlm", behind, v) + weights,
        "dv": np.einsum("bhlmv,bhlm->bhlv", behind, k), "dstate": d_last + np.einsum("bhlm,bhlv->bhmv", q, g),
        "dnormaliser": d_z + (q * reaching).sum(2),
    }  # fmt: skip
    count = max(i["q"].shape[2] + i["q"].shape[3], 1)
    coarse = SPACING[problem.dtype] / SPACING["float32"] if problem.dtype != "float32" else 0.0
    roundings = {"o": 3, "last": 1, "last_z": 1, "dq": 5, "dk": 5, "dv": 5, "dstate": 4, "dnormaliser": 4}
    return [
        Scale(_top(found[name]) * max(1.0, roundings[name] / 2 * coarse / np.sqrt(count)), count)
        for name in result_names(problem.function)
    ]


def _top(array: np.ndarray) -> Any:
    return array.max(-1, keepdims=True, initial=0.0)
