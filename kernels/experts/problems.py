"""What the experts are tried on: loads, ties, drops, values, layouts, drawn by hypothesis so that failures shrink."""

# What a star unpacks may be of any length to a type checker: it does not count arguments behind one.
# pyright: reportCallIssue=false

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kernels.experts.config import PackTile, Plan, RouteTile, RowTile, Tile
from kernels.problem import Problem, conform
from kernels.tolerance import SPACING, Scale, rounded

FUNCTIONS = ("route", "pack", "grouped_linear", "mixture_of_experts")
INPUTS = {
    "route": ("logits",),
    "pack": (),
    "grouped_linear": ("x", "w"),
    "mixture_of_experts": ("x", "gates", "w_in", "w_down"),
}
OUTPUTS = {
    "route": ("gates", "experts", "loads", "aux", "z"),
    "pack": ("order", "places", "offsets"),
    "grouped_linear": ("y",),
    "mixture_of_experts": ("y",),
}
DTYPES = {"gates": "float32", "aux": "float32", "z": "float32"}
TOKENS = (1, 2, 3, 7, 16, 17, 33, 0)
TOKENS_GPU = (*TOKENS, 129, 300, 1000)
EXPERTS = (1, 2, 3, 5, 8, 17)
EXPERTS_GPU = (*EXPERTS, 64, 100, 129, 512)
WIDTHS = (1, 2, 3, 8, 17, 33)
WIDTHS_GPU = (*WIDTHS, 64, 100, 257)
ROUTINGS = ("even", "random", "one gets all", "some get none", "not all served")
LAYOUTS = ("contiguous", "padded", "sliced", "transposed", "swapped")
GRADIENT_LAYOUTS = (*LAYOUTS, "expanded", "constant")


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
    """An array of one kind of value, exactly representable in ``dtype``."""
    normal = np.clip(rng.standard_normal(shape), -4, 4)
    if kind == "integers":  # many ties
        array = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "equal":
        array = np.full(shape, 0.5)
    elif kind == "far apart":
        array = 20 * normal
    elif kind == "zeros":
        array = np.zeros(shape)
    else:
        array = normal
    return rounded(np.asarray(array), dtype).reshape(shape)


def choices(rng: np.random.Generator, N: int, E: int, k: int, routing: str) -> np.ndarray:
    """k different experts for each of N tokens."""
    scores = rng.random((N, E))
    if routing == "even":
        scores = (np.arange(E)[None, :] - k * np.arange(N)[:, None]) % E + 0.0
        scores = -scores
    elif routing == "one gets all":
        scores[:, E // 2] = 2.0
    elif routing == "some get none":
        scores[:, ::2] -= 1.0
    experts = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    if routing == "not all served":  # padding tokens, and numbers that are no expert's
        experts = np.where(rng.random((N, k)) < 0.3, rng.choice([-1, E, E + 1, -99999], (N, k)), experts)
    return experts


@st.composite
def problems(
    draw, function: str, dtype: str, gpu: bool, *, kinds: tuple[str, ...] = ("normal", "integers", "equal", "zeros"),
    layouts: bool = True, launches: bool = False, routings: tuple[str, ...] = ROUTINGS, capacities: bool = True,
    fewest: int = 0,
) -> Problem:  # fmt: skip
    """A problem for ``function``. The order of every choice is from simple to hard: that is how it shrinks."""
    N = draw(st.sampled_from([n for n in (TOKENS_GPU if gpu else TOKENS) if n >= fewest]))
    E = draw(st.sampled_from(EXPERTS_GPU if gpu else EXPERTS))
    k = draw(st.sampled_from(sorted({1, min(2, E), min(3, E), E if E <= 8 else 1})))
    kind = draw(st.sampled_from(kinds))
    gradient_kind = draw(st.sampled_from(("normal", "integers", "zeros")))
    routing = draw(st.sampled_from(routings))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    constants: dict[str, Any] = {}
    cotangents: dict[str, Any] = dict.fromkeys(OUTPUTS[function])
    parameters: dict[str, Any] = {}
    inputs: dict[str, np.ndarray] = {}
    if function == "route":
        biased = draw(st.booleans())
        kind = "far apart" if kind == "zeros" and not biased else kind
        inputs["logits"] = values(rng, (N, E), kind, dtype)
        constants["bias"] = (rng.integers(-4, 5, E) / 8).astype(np.float32) if biased else None
        parameters = {
            "k": k, "scoring": draw(st.sampled_from(("softmax", "sigmoid"))), "renormalise": draw(st.booleans()),
        }  # fmt: skip
        cotangents |= {"gates": values(rng, (N, k), gradient_kind, "float32")}
        cotangents |= {name: values(rng, (), gradient_kind, "float32") for name in ("aux", "z")}
    else:
        experts = choices(rng, N, E, k, routing)
        limit = draw(st.sampled_from((None, 1, 3, N + 1))) if capacities else None
        limit = None if function == "grouped_linear" else limit
        m, n = (draw(st.sampled_from(WIDTHS_GPU if gpu else WIDTHS)) for _ in "mn")
        if function == "grouped_linear":
            loads = np.bincount(experts[(experts >= 0) & (experts < E)], minlength=E)[:E]
            constants["offsets"] = np.concatenate([[0], np.cumsum(loads)]).astype(np.int32)
            inputs = {"x": values(rng, (N * k, m), kind, dtype), "w": values(rng, (E, n, m), kind, dtype)}
            cotangents["y"] = values(rng, (N * k, n), gradient_kind, dtype)
        else:
            constants["experts"] = experts.astype(draw(st.sampled_from((np.int32, np.int64))))
            parameters = {"n_experts": E} if function == "pack" else {}
            parameters["capacity"] = limit
        if function == "mixture_of_experts":
            inputs = {
                "x": values(rng, (N, m), kind, dtype), "gates": np.abs(values(rng, (N, k), "normal", "float32")),
                "w_in": values(rng, (E, 2 * n, m), kind, dtype), "w_down": values(rng, (E, m, n), kind, dtype),
            }  # fmt: skip
            cotangents["y"] = values(rng, (N, m), gradient_kind, dtype)
    chosen = {}
    if layouts:
        chosen |= {
            name: draw(st.sampled_from(LAYOUTS)) for name in (*inputs, *constants) if name not in ("bias", "offsets")
        }
        chosen |= {
            "d" + name: draw(st.sampled_from(GRADIENT_LAYOUTS))
            for name, c in cotangents.items()
            if c is not None and c.ndim
        }
    return Problem(
        function, dtype, {name: conform(a, chosen.get(name, "")) for name, a in inputs.items()},
        {name: a if a is None else conform(a, chosen.get("d" + name, "")) for name, a in cotangents.items()},
        parameters, chosen, draw(launch_sizes()) if launches else None, f"{kind} values, {routing}", constants, DTYPES,
    )  # fmt: skip


@st.composite
def launch_sizes(draw) -> tuple[Plan, RouteTile, PackTile, RowTile]:
    """Small tiles of unequal sides, so that few rows cross several blocks and groups of tiles."""
    m = draw(st.sampled_from((16, 32)))
    tiles = [
        Tile(m, *draw(st.sampled_from(((16, 16), (32, 16), (16, 32)))), 1, 1, draw(st.sampled_from((1, 2, 8))))
        for _ in "ab"
    ]
    weights = Tile(*draw(st.sampled_from(((16, 16, 16), (32, 16, 16), (16, 32, 32)))), 1, 1)
    pack = PackTile(16, 16 * draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 2))), 1)
    return Plan(tiles[0], tiles[1], weights), RouteTile(draw(st.sampled_from((1, 2, 4))), 1), pack, RowTile(2, 16, 1)


def result_names(function: str) -> tuple[str, ...]:
    """Outputs, then the gradients of the inputs."""
    return (*OUTPUTS[function], *("d" + name for name in INPUTS[function]))


def result_dtypes(problem: Problem) -> list[str]:
    """The dtype of every result that is a float."""
    return [
        DTYPES.get(name, DTYPES.get(name.removeprefix("d"), problem.dtype)) for name in result_names(problem.function)
    ]


def scales(problem: Problem) -> list[Scale]:
    """The largest summands behind each result, in order.

    Where a 16-bit kernel stores what its next product reads (h, activations, experts' outputs), a summand carries that
    rounding too: its spacing counts, not that of float32.
    """
    i, rough = problem.inputs, SPACING[problem.dtype] / SPACING["float32"]
    if problem.function == "pack":
        return [Scale(0.0, 1)] * 3
    if problem.function == "route":
        N, E = i["logits"].shape
        lse = np.abs(i["logits"]).max(initial=0.0) + np.log(E)
        arriving = [np.abs(problem.cotangents[n]).max(initial=0.0) for n in ("gates", "aux", "z")]
        dlogits = max(arriving[0], arriving[1] * E / max(N, 1), arriving[2] * 2 * lse / max(N, 1))
        exact = Scale(0.0, 1, by_row=False)
        return [
            Scale(1.0, E),
            exact,
            exact,
            Scale(1.0, N + E, by_row=False),
            Scale(lse**2, N + E, by_row=False),
            Scale(dlogits, E),
        ]
    if problem.function == "grouped_linear":
        x, w, dy = (_top(a) for a in (i["x"], i["w"], problem.cotangents["y"]))
        (A, m), n = i["x"].shape, i["w"].shape[1]
        return [Scale(x * w, m), Scale(dy * w, n), Scale(dy * x, max(A, 1), by_row=False)]
    x, gates, w_in, w_down, dy = (_top(a) for a in (*i.values(), problem.cotangents["y"]))
    (N, m), (E, f_in, _), k = i["x"].shape, i["w_in"].shape, i["gates"].shape[1]
    n = f_in // 2
    h = x * w_in * np.sqrt(m)  # a typical sum, as the largest of few thousand is: three times that
    h = min(3 * h, x * w_in * m)
    a, u = h * h, min(3 * dy * w_down * np.sqrt(m), dy * w_down * m)
    dh = gates * u * max(h, 1.0) * 1.1
    return [
        Scale(rough * gates * a * w_down, n * k),
        Scale(rough * dh * w_in, f_in * k),
        Scale(rough * a * u, max(n, m), by_row=False),
        Scale(rough * dh * x, max(N, m), by_row=False),
        Scale(rough * dy * gates * a, max(N, m), by_row=False),
    ]


def _top(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))
