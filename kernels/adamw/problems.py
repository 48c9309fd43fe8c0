"""What AdamW is tried on."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from kernels.problem import Problem, conform
from kernels.tolerance import Scale, rounded

OPERANDS = {"adamw": ("theta", "g", "m", "n"), "adamw_master": ("theta", "master", "g", "m", "n")}
WRITTEN = {"adamw": ("theta", "m", "n"), "adamw_master": ("theta", "master", "m", "n")}
FP32: dict[str, str] = {name: "float32" for name in ("master", "m", "n")}
SETTINGS = {"lr": 0.5, "beta1": 0.5, "beta2": 0.75, "eps": 0.25, "weight_decay": 0.25, "t": 1, "scale": 1.0}
SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 33, 64)
SIZES_GPU = (*SIZES, 1000, 1024, 4096, 70_000)
VALUES = ("integers", "normal", "zeros", "tiny", "large")
DENSE = ("contiguous", "transposed", "swapped")  # without gaps: what can be written in place
ANY = (*DENSE, "padded", "sliced", "expanded", "constant")
BLOCKS = (16, 32)  # forced on the launch, so that small tensors have several tiles


def made(
    function: str, dtype: str, inputs: Mapping[str, np.ndarray], settings: Mapping[str, Any],
    layouts: Mapping[str, str] | None = None, launch: Any = None, note: str = "",
) -> Problem:  # fmt: skip
    """A problem out of its parts: everything is input, nothing is pulled back."""
    outputs = dict.fromkeys(WRITTEN[function])
    return Problem(function, dtype, inputs, outputs, settings, layouts or {}, launch, note, dtypes=FP32)


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """An array of one kind of value."""
    if kind == "integers":
        return rng.integers(-2, 3, shape).astype(np.float64)
    return rng.standard_normal(shape) * {"normal": 1.0, "zeros": 0.0, "tiny": 2.0**-12, "large": 1e3}[kind]


@st.composite
def problems(draw, function: str, dtype: str, gpu: bool, layouts: bool = True, blocks: bool = False) -> Problem:
    """A problem for ``function``, its choices in order from simple to hard."""
    size = draw(st.sampled_from(SIZES_GPU if gpu else SIZES))
    shape = draw(st.sampled_from(((size,), (3, size), (2, 3, size))))
    kind, t = draw(st.sampled_from(VALUES)), draw(st.sampled_from((1, 2, 3, 10, 1000)))
    settings = {
        "lr": draw(st.sampled_from((0.5, 1e-3, 0.0))), "beta1": draw(st.sampled_from((0.5, 0.9, 0.0))),
        "beta2": draw(st.sampled_from((0.75, 0.95, 0.999))), "eps": draw(st.sampled_from((0.25, 1e-8))),
        "weight_decay": draw(st.sampled_from((0.25, 0.0, 0.1))), "t": t,
        "scale": draw(st.sampled_from((1.0, 0.5, 0.3))),
    }  # fmt: skip
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    same = draw(st.sampled_from(DENSE)) if layouts else ""  # of all that is written: moments lie as their parameter
    chosen = {name: same for name in OPERANDS[function]} if layouts else {}
    if layouts:
        chosen["g"] = draw(st.sampled_from(ANY))
    g = conform(rounded(values(rng, shape, kind), dtype), chosen.get("g", ""))
    m = np.zeros(shape) if t == 1 else rounded(values(rng, shape, kind), "float32")
    n = np.zeros(shape) if t == 1 else rounded(m * m + values(rng, shape, kind) ** 2, "float32")
    weight = rounded(values(rng, shape, "normal"), "float32" if function == "adamw_master" else dtype)
    inputs = {"theta": rounded(weight, dtype), "master": weight, "g": g, "m": m, "n": n}
    inputs = {name: inputs[name] for name in OPERANDS[function]}
    block = draw(st.sampled_from(BLOCKS)) if blocks else None
    return made(function, dtype, inputs, settings, chosen, block, f"{kind} gradients")


def result_names(function: str) -> tuple[str, ...]:
    """What a step writes, then names for the gradients that it does not have."""
    return (*WRITTEN[function], *("d" + name for name in OPERANDS[function]))


def scales(problem: Problem) -> list[Scale]:
    """The largest summand of every row of each result; a step is some six roundings deep."""
    given, s = {name: np.abs(a) for name, a in problem.inputs.items()}, problem.parameters
    g, beta1, beta2, t = given["g"] * s["scale"], s["beta1"], s["beta2"], s["t"]
    m = np.maximum(beta1 * given["m"], (1 - beta1) * g)
    n = beta2 * given["n"] + (1 - beta2) * g**2
    moved = s["lr"] / (1 - beta1**t) * m / (np.sqrt(n / (1 - beta2**t)) + s["eps"])
    weight = np.maximum(given.get("master", given["theta"]), moved)
    found = {"theta": weight, "master": weight, "m": m, "n": n}
    judged = [Scale(found[name].max(-1, keepdims=True, initial=0.0), 6) for name in WRITTEN[problem.function]]
    return judged + [Scale(0.0, 1)] * len(problem.inputs)
