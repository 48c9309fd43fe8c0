"""What the norms are tried on: shapes, values, layouts, drawn by hypothesis so that failures shrink to small cases."""

from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st

from kernels.norm.config import BackwardPlan, Tile
from kernels.problem import Problem, conform
from kernels.tolerance import Scale, rounded

OPERANDS = {
    "rms_norm": ("x", "g"),
    "layer_norm": ("x", "g", "b"),
    "add_rms_norm": ("x", "r", "g"),
    "add_layer_norm": ("x", "r", "g", "b"),
}
EPS = {"rms_norm": 1e-6, "add_rms_norm": 1e-6, "layer_norm": 1e-5, "add_layer_norm": 1e-5}
ROWS = (1, 2, 3, 5)
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64)
LENGTHS_GPU = (*LENGTHS, 257, 768, 1000, 4096, 5000, 8193, 16_384, 16_400, 40_000)
ROWS_GPU = (*ROWS, 17, 300, 1025)
VALUES = ("integers", "normal", "equal", "tiny", "huge-entry", "large", "zeros")
STREAM_LAYOUTS = ("contiguous", "padded", "sliced", "transposed", "swapped", "expanded")
GRADIENT_LAYOUTS = (*STREAM_LAYOUTS, "constant")


def outputs_of(function: str) -> tuple[str, ...]:
    """The names of what a function returns."""
    return ("s", "y") if "r" in OPERANDS[function] else ("y",)


def is_centred(function: str) -> bool:
    """Whether the mean is subtracted."""
    return function.endswith("layer_norm")


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
    """An array of one kind of value, exactly representable in ``dtype``."""
    normal = np.clip(rng.standard_normal(shape), -4, 4)
    if kind == "integers":
        array = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "equal":
        array = np.broadcast_to(normal[..., :1], shape).copy()
    elif kind == "tiny":  # of the size of the root of eps, where its place in the formula shows
        array = 1e-3 * normal
    elif kind == "huge-entry":
        array = normal
        if array.size:
            array[..., rng.integers(shape[-1])] = 1e4
    elif kind == "large":  # the square overflows float16
        array = 1e4 * np.sign(normal) + 100 * normal
    elif kind == "zeros":
        array = np.zeros(shape)
    else:
        array = normal
    return rounded(array, dtype)


@st.composite
def shapes(draw, gpu: bool) -> tuple[int, ...]:
    """(d,), (rows, d) or (batch, length, d)."""
    d = draw(st.sampled_from(LENGTHS_GPU if gpu else LENGTHS))
    rows = draw(st.sampled_from(ROWS_GPU if gpu else ROWS))
    lead = draw(st.sampled_from(((rows,), (), (2, rows))))
    return (*lead, d)


@st.composite
def problems(
    draw, function: str, dtype: str, gpu: bool,
    kinds: tuple[str, ...] = VALUES, layouts: bool = True, launches: bool = False, eps: float | None = None,
) -> Problem:  # fmt: skip
    """A problem for ``function``. The order of every choice is from simple to hard: that is how it shrinks."""
    shape = draw(shapes(gpu))
    kind = draw(st.sampled_from(kinds))
    gradient_kind = draw(st.sampled_from(("integers", "normal", "zeros")))
    weight_kind = draw(st.sampled_from(("integers", "normal")))
    epsilon = draw(st.sampled_from((EPS[function], 1e-3))) if eps is None else eps
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    inputs = {}
    for name in OPERANDS[function]:
        stream = name in ("x", "r")
        inputs[name] = values(rng, shape if stream else shape[-1:], kind if stream else weight_kind, dtype)
    if "r" in inputs and draw(st.booleans()):
        inputs["r"] = values(rng, shape, "normal", dtype)
    cotangents = {name: values(rng, shape, gradient_kind, dtype) for name in outputs_of(function)}

    chosen = {}
    if layouts:
        for name in (n for n in inputs if n in ("x", "r")):
            chosen[name] = draw(st.sampled_from(STREAM_LAYOUTS))
        for name in (n for n in inputs if n in ("g", "b")):
            chosen[name] = draw(st.sampled_from(("contiguous", "sliced")))
        for name in cotangents:
            chosen["d" + name] = draw(st.sampled_from(GRADIENT_LAYOUTS))
    return Problem(
        function, dtype,
        {name: conform(a, chosen.get(name, "")) for name, a in inputs.items()},
        {name: conform(a, chosen.get("d" + name, "")) for name, a in cotangents.items()},
        {"eps": epsilon}, chosen, draw(launch_sizes()) if launches else None, f"{kind} values",
    )  # fmt: skip


@st.composite
def launch_sizes(draw) -> tuple[Tile, BackwardPlan]:
    """Small tiles and few programs, so that short rows already cross blocks and programs walk several rows."""
    block_d = draw(st.sampled_from((16, 32, 128)))
    forward = Tile(draw(st.sampled_from((1, 2, 4))), block_d, 1)
    tile = Tile(
        draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((16, 32, 128))), 1, draw(st.sampled_from((1, 2)))
    )
    return forward, BackwardPlan(tile, draw(st.sampled_from((1, 2, 3))), Tile(1, draw(st.sampled_from((16, 32))), 1))


def with_rounded_sum(operands: list[np.ndarray], dtype: str) -> list[np.ndarray]:
    """The operands of a fused function with the sum already made and rounded, as the contract says it is stored."""
    x, r, *weights = operands
    return [rounded((x + r).astype(np.float32), dtype), np.zeros_like(r), *weights]


def scales(problem: Problem) -> list[Scale]:
    """The largest summands behind each output and gradient, in order: where rounding errors come from."""
    i, eps = problem.inputs, problem.parameters["eps"]
    rows = i["x"] + i.get("r", 0.0)
    d = rows.shape[-1]
    n_rows = int(np.prod(rows.shape[:-1]))
    centred = is_centred(problem.function)
    with np.errstate(all="ignore"):
        deviation = rows - rows.mean(-1, keepdims=True) if centred else rows
        rho = 1 / np.sqrt((deviation**2).mean(-1, keepdims=True) + eps)
    rho = np.where(np.isfinite(rho), rho, 0.0)
    top = _largest(rows * rho)  # of x_hat = rho x - rho mu, whose two parts may cancel, (..., 1)
    gain = np.abs(i["g"]).max(initial=0.0)
    arriving = _largest(problem.cotangents["y"])
    shift = np.abs(i["b"]).max(initial=0.0) if "b" in i else 0.0
    y = Scale(top * gain + shift, d)
    dx = Scale(rho * arriving * gain * np.maximum(top, 1.0), d)
    dg = Scale((arriving * top).max(initial=0.0), n_rows, by_row=False)
    found: Mapping[str, Scale] = {
        "s": Scale(_largest(rows), 1), "y": y, "dx": dx, "dr": dx, "dg": dg,
        "db": Scale(arriving.max(initial=0.0), n_rows, by_row=False),
    }  # fmt: skip
    return [found[name] for name in result_names(problem.function)]


def result_names(function: str) -> tuple[str, ...]:
    """Outputs, then the gradients of the inputs."""
    return (*outputs_of(function), *("d" + name for name in OPERANDS[function]))


def _largest(array: np.ndarray) -> np.ndarray:
    return np.abs(array).max(-1, keepdims=True, initial=0.0)
