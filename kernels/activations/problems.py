"""What the gated units are tried on."""

import numpy as np
from hypothesis import strategies as st

from kernels.activations.config import Tile
from kernels.problem import LAYOUTS, Problem, conform
from kernels.tolerance import Scale, rounded

OPERANDS = {
    "swiglu": ("h",), "geglu": ("h",), "swiglu_pair": ("value", "gate"), "geglu_pair": ("value", "gate")
}  # fmt: skip
WIDTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64)
WIDTHS_GPU = (*WIDTHS, 257, 768, 1000, 4096, 5000, 14_336)
VALUES = ("integers", "normal", "zeros", "far")
LAYOUTS_IN = (*LAYOUTS, "expanded")


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
    """An array of one kind of value, exactly representable in ``dtype``; "far" is where activations are flat."""
    array = np.clip(rng.standard_normal(shape), -4, 4)
    if kind == "integers":
        array = rng.integers(-2, 3, shape).astype(np.float64)
    elif kind == "zeros":
        array = np.zeros(shape)
    elif kind == "far":
        array = 100 * array
    return rounded(array, dtype)


@st.composite
def problems(draw, function: str, dtype: str, gpu: bool, layouts: bool = True, launches: bool = False) -> Problem:
    """A problem for ``function``, its choices in order from simple to hard."""
    d = draw(st.sampled_from(WIDTHS_GPU if gpu else WIDTHS))
    rows = draw(st.sampled_from((1, 2, 3, 5, 300) if gpu else (1, 2, 3, 5)))
    shape = (*draw(st.sampled_from(((rows,), (), (2, rows)))), d)
    kind, arriving = draw(st.sampled_from(VALUES)), draw(st.sampled_from(("integers", "normal")))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    inputs = {
        "value": values(rng, shape, "normal" if kind == "far" else kind, dtype), "gate": values(rng, shape, kind, dtype)
    }  # fmt: skip
    if "h" in OPERANDS[function]:
        inputs = {"h": np.concatenate(list(inputs.values()), -1)}
    cotangents = {"y": values(rng, shape, arriving, dtype)}
    chosen = {}
    if layouts:
        chosen = {name: draw(st.sampled_from(LAYOUTS_IN)) for name in inputs}
        chosen["dy"] = draw(st.sampled_from((*LAYOUTS_IN, "constant")))
    small = st.builds(Tile, st.sampled_from((1, 2, 4)), st.sampled_from((16, 32)), st.just(1))
    return Problem(
        function, dtype, {name: conform(a, chosen.get(name, "")) for name, a in inputs.items()},
        {name: conform(a, chosen.get("d" + name, "")) for name, a in cotangents.items()},
        {}, chosen, draw(st.tuples(small, small)) if launches else None, f"{kind} values",
    )  # fmt: skip


def value_and_gate(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The two operands, however they are given."""
    return tuple(problem.inputs.values()) if len(problem.inputs) == 2 else tuple(np.split(problem.inputs["h"], 2, -1))  # type: ignore[return-value]


def result_names(function: str) -> tuple[str, ...]:
    """The output, then the gradients of the inputs."""
    return ("y", *("d" + name for name in OPERANDS[function]))


def scales(problem: Problem) -> list[Scale]:
    """The largest number behind each result: the slope of both activations stays below 1.13."""
    v, z = (np.abs(a).max(-1, keepdims=True, initial=0.0) for a in value_and_gate(problem))
    dy = np.abs(problem.cotangents["y"]).max(-1, keepdims=True, initial=0.0)
    found = {"y": v * z, "dvalue": dy * z, "dgate": 1.2 * dy * v}
    found["dh"] = np.maximum(found["dvalue"], found["dgate"])
    return [Scale(found[name], 1) for name in result_names(problem.function)]
