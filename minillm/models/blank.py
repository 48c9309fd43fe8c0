"""Models whose weights are about to be overwritten: made without drawing a single random number."""

from typing import Any

import numpy as np


class _Blank(np.random.Generator):
    """A generator that draws nothing: what it returns is memory as it comes."""

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> np.ndarray:
        return np.empty(size, np.float32)

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> np.ndarray:
        return np.empty(size, np.float32)


BLANK = _Blank(np.random.PCG64(0))
