"""Models whose weights are about to be overwritten: made without drawing a single random number."""

from typing import Any, cast

import numpy as np


class _Blank:
    """Stands in for a generator: what it draws is memory as it comes."""

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: Any = None) -> np.ndarray:
        return np.empty(size, np.float32)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: Any = None) -> np.ndarray:
        return np.empty(size, np.float32)


BLANK = cast(np.random.Generator, _Blank())
