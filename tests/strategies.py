"""Hypothesis strategies: arrays of every shape, content and memory layout that the engine has to take.

Contents are drawn element by element, so that a failing case shrinks to a readable one.
"""

import os
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

CI = os.environ.get("CI", "") not in ("", "0", "false")


def examples(fast: int, thorough: int) -> int:
    """How many examples to draw for each of several hundred functions: few at the desk, many in CI."""
    return thorough if CI else fast


def seeds() -> st.SearchStrategy[int]:
    """Seeds for `numpy.random.default_rng`."""
    return st.integers(0, 2**32 - 1)


def shapes(min_dims: int = 0, max_dims: int = 3, min_side: int = 0, max_side: int = 4):
    """Shapes, 0-d and empty ones included."""
    return hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=max_side)


def broadcast_shapes(n: int = 2, max_dims: int = 3, min_side: int = 0, max_side: int = 3):
    """Shapes that broadcast against one another: missing axes, axes of length 1, 0-d and empty ones."""
    drawn = hnp.mutually_broadcastable_shapes(
        num_shapes=n, min_dims=0, max_dims=max_dims, min_side=min_side, max_side=max_side
    )
    return drawn.map(lambda found: found.input_shapes)


def _elements(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers that float32 holds exactly, so that both precisions get the same input."""
    return st.floats(low, high, width=32, allow_subnormal=False).map(lambda v: 0.0 if abs(v) < 1e-3 else v)


def ordinary(shape: Any, low: float = -3.0, high: float = 3.0) -> st.SearchStrategy[np.ndarray]:
    """Floats of ordinary size, float64."""
    return hnp.arrays(np.float64, shape, elements=_elements(low, high))


def positive(shape: Any, low: float = 0.25, high: float = 3.0) -> st.SearchStrategy[np.ndarray]:
    """Floats above 0, for logarithms, roots and denominators."""
    return hnp.arrays(np.float64, shape, elements=_elements(low, high))


def tied(shape: Any) -> st.SearchStrategy[np.ndarray]:
    """A few small integers and zeros as floats: equal entries are likely."""
    return hnp.arrays(np.float64, shape, elements=st.sampled_from([-1.0, 0.0, 0.0, 1.0, 2.0]))


def huge(shape: Any, dtype: Any = np.float32) -> st.SearchStrategy[np.ndarray]:
    """Numbers whose exponential overflows or vanishes in any precision."""
    values = st.sampled_from([-1e30, -1e4, -800.0, -1.0, 0.0, 1.0, 800.0, 1e4, 1e30])
    return hnp.arrays(np.float64, shape, elements=values).map(lambda a: a.astype(dtype))


def contents(shape: Any) -> st.SearchStrategy[np.ndarray]:
    """Ordinary numbers, ties, or zeros throughout."""
    return st.one_of(ordinary(shape), tied(shape), st.just(shape).map(np.zeros))


LAYOUTS = ("contiguous", "reversed", "transposed", "strided", "offset")


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values in another memory layout: negative steps, transposed axes, gaps between elements."""
    if array.ndim == 0:
        return array.copy()
    if layout == "reversed":
        every_axis = (slice(None, None, -1),) * array.ndim
        return array[every_axis].copy()[every_axis]
    if layout == "transposed":
        return array.T.copy().T
    if layout == "strided":
        wide = np.full(tuple(2 * n for n in array.shape), 77, array.dtype)
        every_second = (slice(None, None, 2),) * array.ndim
        wide[every_second] = array
        return wide[every_second]
    if layout == "offset":
        wide = np.full(tuple(n + 2 for n in array.shape), 77, array.dtype)
        inner = (slice(1, -1),) * array.ndim
        wide[inner] = array
        return wide[inner]
    return array.copy()


def layouts() -> st.SearchStrategy[str]:
    """The names of memory layouts other than the ordinary one."""
    return st.sampled_from(LAYOUTS[1:])


@st.composite
def keep_masks(draw, shape: tuple[int, ...]) -> np.ndarray:
    """Boolean masks, true where kept; often one row of the last axis keeps nothing."""
    mask = draw(hnp.arrays(np.bool_, shape))
    if mask.ndim and mask.size and draw(st.booleans()):
        mask.reshape(-1, mask.shape[-1])[0] = False
    return mask
