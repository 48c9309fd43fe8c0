"""What attention is tried on: shapes, masks, values, layouts, drawn by hypothesis so that failures shrink to small cases."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from kernels.attention import reference
from kernels.attention.config import Plan, Tile
from kernels.problem import Problem, conform
from kernels.tolerance import SPACING, Scale, rounded

DENSE, PACKED = ("attention", "attention_with_lse"), ("packed_attention",)
FUNCTIONS = (*DENSE, *PACKED)
OUTPUTS = {"attention": ("o",), "attention_with_lse": ("o", "lse"), "packed_attention": ("o",)}
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33)
LENGTHS_GPU = (*LENGTHS, 64, 127, 129, 257, 511, 1000)
WIDTHS = (8, 16, 24, 40)
WIDTHS_GPU = (*WIDTHS, 64, 80, 96, 128, 192, 256)
HEADS = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2))
FEW_HEADS = ((1, 1), (2, 1), (4, 2))
MASKS = ("full", "causal", "top-left", "window", "prefix", "padding", "causal padding", "narrow window")
VALUES = ("integers", "normal", "equal", "large", "zeros")
LAYOUTS = ("contiguous", "padded", "sliced", "transposed", "swapped")
GRADIENT_LAYOUTS = (*LAYOUTS, "expanded", "constant")


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
    """An array of one kind of value, exactly representable in ``dtype``."""
    normal = np.clip(rng.standard_normal(shape), -4, 4)
    if kind == "integers":
        array = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "equal":
        array = np.broadcast_to(normal[..., :1], shape).copy()
    elif kind == "large":  # one key takes it all
        array = 12 * normal
    elif kind == "zeros":
        array = np.zeros(shape)
    else:
        array = normal
    return rounded(array, dtype)


@st.composite
def problems(
    draw, function: str, dtype: str, gpu: bool, *, kinds: tuple[str, ...] = VALUES, layouts: bool = True,
    launches: bool = False, masks: tuple[str, ...] = MASKS, softcaps: tuple[Any, ...] = (None, 5.0), small: bool = False,
    square: bool = False,
) -> Problem:  # fmt: skip
    """A problem for ``function``. The order of every choice is from simple to hard: that is how it shrinks."""
    lengths = LENGTHS_GPU if gpu else LENGTHS[:-2] if small else LENGTHS
    L_q, L_k = draw(st.sampled_from(lengths)), draw(st.sampled_from(lengths))
    L_k = L_q if square else L_k
    H, H_kv = draw(st.sampled_from(FEW_HEADS if small else HEADS))
    d, d_v = (draw(st.sampled_from(WIDTHS_GPU if gpu else WIDTHS)) for _ in "kv")
    mask = draw(st.sampled_from(masks))
    cap = draw(st.sampled_from(softcaps))
    scale = draw(st.sampled_from((None, 0.25)))
    kind = draw(st.sampled_from(kinds))
    gradient_kind = draw(st.sampled_from(("integers", "normal", "zeros")))
    packed = function in PACKED
    B = 1 if packed else draw(st.sampled_from((1, 2)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    if packed:
        shapes = {"q": (L_q, H, d), "k": (L_k, H_kv, d), "v": (L_k, H_kv, d_v), "o": (L_q, H, d_v)}
    else:
        shapes = {"q": (B, H, L_q, d), "k": (B, H_kv, L_k, d), "v": (B, H_kv, L_k, d_v), "o": (B, H, L_q, d_v)}
    inputs = {n: values(rng, shapes[n], "normal" if n == "v" and kind == "large" else kind, dtype) for n in "qkv"}
    cotangents = {"o": values(rng, shapes["o"], gradient_kind, dtype)}
    if function == "attention_with_lse":
        cotangents["lse"] = values(rng, (B, H, L_q), gradient_kind, "float32")
    how = {
        "causal": mask not in ("full", "padding"),
        "window": None,
        "align": "bottom-right",
        "scale": scale,
        "softcap": cap,
    }
    how["align"] = "top-left" if mask in ("top-left", "prefix") else "bottom-right"
    if "window" in mask:
        how["window"] = 2 if "narrow" in mask else 9
    constants: dict[str, Any] = {"key_lengths": None, "prefix": None}
    if "padding" in mask:
        constants["key_lengths"] = rng.integers(0, L_k + 1, B)
    if mask == "prefix":
        constants["prefix"] = rng.integers(0, L_k + 1, B)
    if packed:
        constants = {name: starts(rng, n, 3) for name, n in (("starts_q", L_q), ("starts_k", L_k))}

    chosen = {}
    if layouts:
        chosen |= {n: draw(st.sampled_from(LAYOUTS)) for n in inputs}
        chosen |= {"d" + n: draw(st.sampled_from(GRADIENT_LAYOUTS if n == "o" else LAYOUTS[:3])) for n in cotangents}
    return Problem(
        function, dtype,
        {name: conform(a, chosen.get(name, "")) for name, a in inputs.items()},
        {name: conform(a, chosen.get("d" + name, "")) for name, a in cotangents.items()},
        how, chosen, draw(plans()) if launches else None, f"{mask} mask, {kind} values",
        constants, {"lse": "float32"},
    )  # fmt: skip


def starts(rng: np.random.Generator, n: int, documents: int) -> np.ndarray:
    """Where documents begin among n positions, and where the last one ends: some are empty, something may follow."""
    cuts = np.sort(rng.integers(0, n + 1, documents))
    if rng.random() < 0.5:
        cuts[-1] = n
    return np.concatenate([[0], cuts]).astype(np.int32)


@st.composite
def plans(draw) -> Plan:
    """Tiles of other sizes, so that the same numbers are added in another order."""
    sizes = st.sampled_from(((16, 16), (16, 32), (32, 16), (64, 16)))
    tiles = [Tile(m, n, 1, 1) for m, n in (draw(sizes) for _ in range(3))]
    return Plan(tiles[0], tiles[1], tiles[2])


def result_names(function: str) -> tuple[str, ...]:
    """Outputs, then the gradients of the inputs."""
    return (*OUTPUTS[function], "dq", "dk", "dv")


@dataclass(frozen=True)
class Dense:
    """Everything that attention computes on the way, as matrices of every head in float64: for allowances only."""

    q: np.ndarray  # (B, H, L_q, d)
    k: np.ndarray  # (B, H, L_k, d), given to every query head
    v: np.ndarray
    do: np.ndarray
    dlse: np.ndarray  # (B, H, L_q, 1)
    keep: np.ndarray
    s: np.ndarray  # scores with the soft cap, (B, H, L_q, L_k)
    p: np.ndarray
    scale: float


def dense(problem: Problem) -> Dense:
    """The matrices of a problem."""
    i, c, how = problem.inputs, problem.constants, problem.parameters
    q, k, v, do = i["q"], i["k"], i["v"], problem.cotangents["o"]
    if problem.function in PACKED:
        q, k, v, do = (a.transpose(1, 0, 2)[None] for a in (q, k, v, do))
        keep = np.zeros((q.shape[2], k.shape[2]), dtype=bool)
        a, b = c["starts_q"], c["starts_k"]
        for n in range(len(a) - 1):
            size = a[n + 1] - a[n], b[n + 1] - b[n]
            keep[a[n] : a[n + 1], b[n] : b[n + 1]] = reference.mask(
                *size, None, how["causal"], how["window"], how["align"]
            )
    else:
        keep = reference.mask(q.shape[2], k.shape[2], c["prefix"], how["causal"], how["window"], how["align"])
        if c["key_lengths"] is not None:
            keep = keep & (np.arange(k.shape[2]) < c["key_lengths"][:, None, None, None])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if how["scale"] is None else how["scale"]
    s = scale * (q @ k.swapaxes(-1, -2))
    if how["softcap"] is not None:
        s = how["softcap"] * np.tanh(s / how["softcap"])
    keep = np.broadcast_to(keep, s.shape)
    top = np.where(keep, s, -np.inf).max(-1, keepdims=True, initial=-1e300)
    e = np.where(keep, np.exp(np.minimum(s - top, 0)), 0.0)
    total = e.sum(-1, keepdims=True)
    dlse = problem.cotangents.get("lse", np.zeros(q.shape[:3]))[..., None]
    return Dense(q, k, v, do, dlse, keep, s, e / np.where(total == 0, 1, total), scale)


def scales(problem: Problem) -> list[Scale]:
    """What rounding does to each output and gradient, in order.

    A score of size s has an error of s times the unit of fp32, and so has its probability relative to it; the soft cap
    adds an error of its own size. In 16 bits the probabilities and the scores' gradients are rounded once more before
    they meet V, dO, K and Q, and the saved output, from which delta is made, is rounded too.
    """
    m = dense(problem)
    half = 0.5 * SPACING[problem.dtype] / SPACING["float32"] if problem.dtype != "float32" else 0.0
    some = m.keep.any(-1, keepdims=True)
    size = (
        1 + np.where(m.keep, np.abs(m.s), 0).max(-1, keepdims=True, initial=0.0) + (problem.parameters["softcap"] or 0)
    )
    group = m.q.shape[1] // problem.inputs["k"].shape[1]
    count = math.sqrt(max(m.q.shape[-1], m.v.shape[-1], m.s.shape[-2] * group, m.s.shape[-1]))
    q, k, v, do = (np.abs(a) for a in (m.q, m.k, m.v, m.do))
    dp = m.do @ m.v.swapaxes(-1, -2)
    o = m.p @ m.v
    delta = (o * m.do).sum(-1, keepdims=True) - m.dlse
    ds = m.p * np.abs(dp - delta)
    rest = (np.abs(o) * do).sum(-1, keepdims=True)  # what rounding the saved output can do to delta
    errors = m.p * (do @ v.swapaxes(-1, -2) + (m.p @ v * do).sum(-1, keepdims=True) + np.abs(m.dlse)) * size * count
    errors = errors + half * (ds + m.p * rest)
    weights = m.p * (size * count + half)
    largest = {
        "o": weights @ v, "dq": m.scale * (errors @ k), "dk": m.scale * (errors.swapaxes(-1, -2) @ q),
        "dv": weights.swapaxes(-1, -2) @ do,
    }  # fmt: skip
    found = {name: Scale(_row(_as_given(problem, name, a)), 1) for name, a in largest.items()}
    found["lse"] = Scale((size * some).max(-2) * count, 1)  # (B, H, 1)
    return [found[name] for name in result_names(problem.function)]


def _row(array: np.ndarray) -> np.ndarray:
    return array.max(-1, keepdims=True, initial=0.0)


def _as_given(problem: Problem, name: str, array: np.ndarray) -> np.ndarray:
    """From (B, H, L, width) to the shape of the result: groups summed, packed documents with heads second."""
    packed = problem.function in PACKED
    H_kv = problem.inputs["k"].shape[1]
    if name in ("dk", "dv"):
        array = array.reshape(array.shape[0], H_kv, array.shape[1] // H_kv, *array.shape[2:]).sum(2)
    return array[0].swapaxes(0, 1) if packed else array
