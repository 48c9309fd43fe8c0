"""What the rotation is tried on."""

import numpy as np
from hypothesis import strategies as st

from kernels.problem import LAYOUTS, Problem, conform
from kernels.rope.config import Tile
from kernels.tolerance import Scale, rounded
from minillm.functional.positions import rotation_angles

LENGTHS = (1, 2, 3, 7, 17)
WIDTHS = (2, 4, 6, 16, 24, 34)
LENGTHS_GPU = (*LENGTHS, 300)
WIDTHS_GPU = (*WIDTHS, 64, 80, 128, 256)
LAYOUTS_IN = (*LAYOUTS, "expanded")
result_names = {"rope": ("y", "dx")}


@st.composite
def problems(draw, function: str, dtype: str, gpu: bool, layouts: bool = True, launches: bool = False) -> Problem:
    """A rotation: lengths and widths, both pairings, positions counted, given, or given for each text."""
    length = draw(st.sampled_from(LENGTHS_GPU if gpu else LENGTHS))
    d = draw(st.sampled_from(WIDTHS_GPU if gpu else WIDTHS))
    lead = draw(st.sampled_from(((2,), (), (2, 3))))
    pairing = draw(st.sampled_from(("interleaved", "half")))
    start = draw(st.sampled_from((0, 1, 5)))
    kinds = ("counted", "given", "each") if lead else ("counted", "given")
    kind = draw(st.sampled_from(kinds))
    values = draw(st.sampled_from(("integers", "normal", "large")))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    def drawn(shape: tuple[int, ...]) -> np.ndarray:
        array = rng.integers(-2, 3, shape) if values == "integers" else np.clip(rng.standard_normal(shape), -4, 4)
        return rounded((1e3 if values == "large" else 1.0) * array, dtype)

    size = length + start + 2
    angles = rotation_angles(np.arange(size), d, 100.0)
    shape = (length,) if kind == "given" else (lead[0] if lead else 1, length)
    positions = None if kind == "counted" else rng.integers(0, size - start, shape)
    inputs, cotangents, chosen = {"x": drawn((*lead, length, d))}, {"y": drawn((*lead, length, d))}, {}
    if layouts:
        chosen = {"x": draw(st.sampled_from(LAYOUTS_IN)), "dy": draw(st.sampled_from((*LAYOUTS_IN, "constant")))}
    tile = st.builds(
        Tile, st.sampled_from((1, 2, 4)), st.sampled_from([b for b in (8, 16, 64, 128) if 2 * b >= d]), st.just(1)
    )
    return Problem(
        function, dtype, {"x": conform(inputs["x"], chosen.get("x", ""))},
        {"y": conform(cotangents["y"], chosen.get("dy", ""))}, {"start": start, "pairing": pairing}, chosen,
        draw(tile) if launches else None, f"{values} values, positions {kind}",
        {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32), "positions": positions},
    )  # fmt: skip


def scales(problem: Problem) -> list[Scale]:
    """Two products behind each result."""
    largest = [np.abs(a).max(-1, keepdims=True, initial=0.0) for a in (problem.inputs["x"], problem.cotangents["y"])]
    return [Scale(a, 2) for a in largest]
