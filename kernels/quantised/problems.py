"""What products with quantised weights are tried on."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kernels.problem import LAYOUTS, Problem, conform
from kernels.quantised import reference
from kernels.quantised.config import Tile
from kernels.tolerance import Scale, rounded
from minillm.functional.nf4 import META_BLOCK

FUNCTIONS = ("int8_linear", "nf4_linear", "nf4_double_linear")
SIZES = (1, 2, 3, 7, 16, 17, 31, 33, 64)
SIZES_GPU = (*SIZES, 100, 128, 257, 768)
ROWS, ROWS_GPU = (1, 2, 5, 16, 17, 33), (1, 3, 16, 17, 64, 300)
BLOCKS = (2, 16, 64)
VALUES = ("integers", "normal", "zeros")
MEAN = 0.5


def values(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
    """An array of one kind of value, exactly representable in ``dtype``."""
    if kind == "integers":
        return rng.integers(-2, 3, shape).astype(np.float64)
    return rounded(np.zeros(shape) if kind == "zeros" else np.clip(rng.standard_normal(shape), -4, 4), dtype)


def stored(
    rng: np.random.Generator, function: str, n: int, k: int, block: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Codes and scales drawn at random, and the parameters that go with them."""
    if function == "int8_linear":
        codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
        return {"codes": codes, "scale": rng.uniform(0.001, 0.02, (n, 1)).astype(np.float32)}, {}
    codes = rng.integers(0, 256, -(-n * k // 2)).astype(np.uint8)
    if n * k % 2:
        codes[-1] &= 0xF0  # as the quantiser leaves the half that nobody reads
    blocks, parameters = -(-n * k // block), {"n_out": n, "block": block}
    if function == "nf4_linear":
        return {"packed": codes, "scale": rng.uniform(0.5, 2, blocks).astype(np.float32)}, parameters
    rows = -(-blocks // META_BLOCK)
    scale = rng.integers(-127, 128, (rows, META_BLOCK)).astype(np.int8)
    meta = rng.uniform(0.001, 0.003, (rows, 1)).astype(np.float32)
    return {"packed": codes, "scale": scale, "meta": meta}, {"mean": MEAN, **parameters}


@st.composite
def problems(draw, function: str, dtype: str, gpu: bool, layouts: bool = True, launches: bool = False) -> Problem:
    """A problem for ``function``, its choices in order from simple to hard."""
    sizes = st.sampled_from(SIZES_GPU if gpu else SIZES)
    k, n, rows = draw(sizes), draw(sizes), draw(st.sampled_from(ROWS_GPU if gpu else ROWS))
    shape = (*draw(st.sampled_from(((rows,), (2, rows), ()))), k)
    kind, block = draw(st.sampled_from(VALUES)), draw(st.sampled_from(BLOCKS))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    constants, parameters = stored(rng, function, n, k, block)
    x = values(rng, shape, kind, dtype)
    dy = values(rng, (*shape[:-1], n), "normal" if kind == "zeros" else kind, dtype)
    chosen = {}
    if layouts:
        chosen = {name: draw(st.sampled_from((*LAYOUTS, "expanded", *more))) for name, more in
                  (("x", ()), ("dy", ("constant",)))}  # fmt: skip
    size = st.builds(Tile, *[st.sampled_from((16, 32))] * 3, st.just(1), st.just(1))
    return Problem(
        function, dtype, {"x": conform(x, chosen.get("x", ""))}, {"y": conform(dy, chosen.get("dy", ""))}, parameters,
        chosen, draw(size) if launches else None, f"{kind} x", constants,
    )  # fmt: skip


def weights(problem: Problem) -> np.ndarray:
    """W as the contract has it: dequantised in float32, then rounded to the type of x."""
    n, k = problem.cotangents["y"].shape[-1], problem.inputs["x"].shape[-1]
    c, s = problem.constants, problem.parameters
    if problem.function == "int8_linear":
        w = reference.int8_weights(c["codes"], c["scale"])
    elif problem.function == "nf4_linear":
        w = reference.nf4_weights(c["packed"], c["scale"], n, k, s["block"])
    else:
        w = reference.nf4_double_weights(c["packed"], c["scale"], c["meta"], s["mean"], n, k, s["block"])
    return rounded(w, problem.dtype)


def result_names(function: str) -> tuple[str, ...]:
    """The output and the gradient."""
    return ("y", "dx")


def scales(problem: Problem) -> list[Scale]:
    """The largest product behind every row of each result, and how many are added."""
    largest = np.abs(weights(problem)).max(initial=0.0)
    found = []
    for array in (problem.inputs["x"], problem.cotangents["y"]):
        found.append(Scale(np.abs(array).max(-1, keepdims=True, initial=0.0) * largest, array.shape[-1]))
    return found
