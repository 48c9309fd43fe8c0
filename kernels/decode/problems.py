"""What decoding is tried on: caches, lengths, windows, tables, drawn by hypothesis so that failures shrink to small cases."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kernels.decode.config import Plan
from kernels.problem import Problem, conform
from kernels.tolerance import SPACING, Scale, rounded

FUNCTIONS = ("decode_attention", "paged_decode_attention", "latent_decode_attention", "merge_attention")
DECODERS = FUNCTIONS[:3]
INPUTS = {
    "decode_attention": ("q", "k", "v"),
    "paged_decode_attention": ("q", "k", "v"),
    "latent_decode_attention": ("q", "c"),
    "merge_attention": ("o", "lse"),
}
OUTPUTS = ("o", "lse")
CAPACITIES = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64)
CAPACITIES_GPU = (*CAPACITIES, 128, 257, 1000, 4096)
WIDTHS = (1, 3, 8, 16, 17, 24, 40)
WIDTHS_GPU = (*WIDTHS, 64, 80, 128, 192, 256)
GROUPS = (1, 2, 3, 5, 8, 17)
VALUES = ("integers", "normal", "equal", "huge-entry", "large", "zeros")
LAYOUTS = ("contiguous", "padded", "sliced", "transposed", "swapped", "expanded")


def result_names(function: str) -> tuple[str, ...]:
    """Outputs, then the gradients of the inputs (which do not exist, but have names)."""
    return (*OUTPUTS, *("d" + name for name in INPUTS[function]))


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
    """An array of one kind of value, exactly representable in ``dtype``."""
    array = np.clip(rng.standard_normal(shape), -4, 4)
    if kind == "integers":
        array = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "equal":
        array = np.broadcast_to(array[..., :1, :1], shape).copy()
    elif kind == "huge-entry" and array.size:
        array.reshape(-1)[rng.integers(array.size)] = 1e3
    elif kind == "large":  # scores of thousands: one key takes it all
        array = 30 * array
    elif kind == "zeros":
        array = np.zeros(shape)
    return rounded(array, dtype)


@st.composite
def decoding(
    draw, function: str, dtype: str, gpu: bool, kinds: tuple[str, ...] = VALUES, layouts: bool = True,
    launches: bool = False, one_new: bool = False, window: Any = (None, 1, 2, 5, 17, 1000),
    softcap: Any = (None, 2.0, 30.0), full: bool | None = None,
) -> Problem:  # fmt: skip
    """A problem for one of the three decoders. Every choice goes from simple to hard: that is how it shrinks.

    ``one_new`` draws a single new token, ``full`` whether all lengths are the capacity (None: either).
    """
    B, H_kv = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2)))
    group, L_q = draw(st.sampled_from(GROUPS)), 1 if one_new else draw(st.sampled_from((1, 2, 3)))
    capacity = draw(st.sampled_from(CAPACITIES_GPU if gpu else CAPACITIES))
    d, d_v = (draw(st.sampled_from(WIDTHS_GPU if gpu else WIDTHS)) for _ in range(2))
    kind, kind_v = draw(st.sampled_from(kinds)), draw(st.sampled_from(("integers", "normal")))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    parameters: dict[str, Any] = {"scale": draw(st.sampled_from((None, 0.5)))}
    parameters["window"], parameters["softcap"] = draw(st.sampled_from(window)), draw(st.sampled_from(softcap))

    inputs, constants = {}, {}
    if function == "latent_decode_attention":
        H_kv, d_v = 1, min(d, d_v)
        parameters = {"d_v": d_v, **parameters}
        inputs["c"] = values(rng, (B, capacity, d), kind, dtype)
    elif function == "paged_decode_attention":
        page = draw(st.sampled_from((1, 3, 16)))
        pages = -(-capacity // page)
        capacity, n_pages = page * pages, B * pages + 1
        inputs["k"] = values(rng, (n_pages, H_kv, page, d), kind, dtype)
        inputs["v"] = values(rng, (n_pages, H_kv, page, d_v), kind_v, dtype)
        constants["table"] = rng.permutation(n_pages)[: B * pages].reshape(B, pages).astype(np.int32)
    else:
        inputs["k"] = values(rng, (B, H_kv, capacity, d), kind, dtype)
        inputs["v"] = values(rng, (B, H_kv, capacity, d_v), kind_v, dtype)
    inputs = {"q": values(rng, (B, H_kv * group, L_q, d), "normal" if kind == "zeros" else kind, dtype), **inputs}

    whole = draw(st.booleans()) if full is None else full
    lengths = None if whole else rng.integers(0, capacity + 1, B).astype(draw(st.sampled_from((np.int32, np.int64))))
    chosen = {name: draw(st.sampled_from(LAYOUTS)) for name in inputs} if layouts else {}
    return Problem(
        function, dtype, {name: conform(a, chosen.get(name, "")) for name, a in inputs.items()},
        {"o": None, "lse": None}, parameters, chosen, draw(plans()) if launches else None, f"{kind} values",
        {"lengths": lengths, **constants}, {"lse": "float32"},
    )  # fmt: skip


@st.composite
def merging(draw, function: str, dtype: str, gpu: bool, kinds: tuple[str, ...] = (), layouts: bool = True) -> Problem:
    """Parts to merge, some of them empty."""
    shape = draw(st.sampled_from(((1,), (2,), (5,), (2, 3), (1, 2, 2))))
    parts, d_v = draw(st.sampled_from((1, 2, 3, 16, 17, 40))), draw(st.sampled_from(WIDTHS))
    spread = draw(st.sampled_from((1.0, 30.0)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    o = values(rng, (parts, *shape, d_v), "normal", dtype)
    lse = rounded(spread * rng.standard_normal((parts, *shape)), "float32")
    lse[rng.random(lse.shape) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = -np.inf
    chosen = {name: draw(st.sampled_from(LAYOUTS[:-1])) for name in ("o", "lse")} if layouts else {}
    return Problem(
        function, dtype, {"o": o, "lse": lse}, {"o": None, "lse": None}, {}, chosen, None, "", {}, {"lse": "float32"}
    )


def problems(function: str, dtype: str, gpu: bool, **options: Any) -> st.SearchStrategy:
    """Problems for any function of the family."""
    draw = merging if function == "merge_attention" else decoding
    return draw(function, dtype, gpu, **options)


@st.composite
def plans(draw) -> Plan:
    """Small tiles and several splits, so that short caches already cross blocks and leave parts empty."""
    return Plan(
        draw(st.sampled_from((16, 32))), draw(st.sampled_from((16, 32))), draw(st.sampled_from((1, 2, 3, 7))), 1,
        draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 2, 16))),
    )  # fmt: skip


def dense(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The keys and values of a decoder's problem as (B, H_kv, capacity, d) and (B, H_kv, capacity, d_v)."""
    i = problem.inputs
    if "c" in i:
        c = i["c"][:, None]
        return c, c[..., : problem.parameters["d_v"]]
    if "table" not in problem.constants:
        return i["k"], i["v"]
    table = problem.constants["table"]

    def in_order(pages: np.ndarray) -> np.ndarray:
        B, n = table.shape
        chosen = pages[table].swapaxes(1, 2)  # (B, H_kv, n, page, d)
        return chosen.reshape(B, pages.shape[1], n * pages.shape[2], pages.shape[3])

    return in_order(i["k"]), in_order(i["v"])


def scales(problem: Problem) -> list[Scale]:
    """The largest summands behind each output, in order: where rounding errors come from.

    Probabilities are rounded to the dtype of the values, each by at most half a spacing of its own size, and they sum
    to 1: that moves an output by at most half a spacing of the largest value. A score is a sum of d products, and its
    error is a relative error of the probability.
    """
    nothing = [Scale(0.0, 1) for _ in problem.inputs]
    if problem.function == "merge_attention":
        lse = problem.inputs["lse"]
        size = np.abs(np.where(np.isfinite(lse), lse, 0)).max(initial=0.0)
        top = np.abs(problem.inputs["o"]).max(initial=0.0)
        return [Scale(top * (1 + size), len(lse)), Scale(1 + size, len(lse)), *nothing]
    q = problem.inputs["q"]
    k, v = dense(problem)
    scale = problem.parameters["scale"] or q.shape[-1] ** -0.5
    cap = problem.parameters["softcap"] or 0.0
    largest = np.abs(q).sum(-1).max(initial=0.0) * np.abs(k).max(initial=0.0) * scale
    score = 1 + min(np.abs(q).max(initial=0.0) * np.abs(k).sum(-1).max(initial=0.0) * scale, largest) + cap
    coarse = SPACING[problem.dtype] / SPACING["float32"] if problem.dtype != "float32" else 0.0
    count = max(k.shape[-1], k.shape[2], 1)
    top = np.abs(v).max(initial=0.0)
    return [Scale(max(top * score, top * coarse / np.sqrt(count)), count), Scale(score, count), *nothing]
