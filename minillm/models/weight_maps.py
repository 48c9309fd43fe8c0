"""What the maps from other libraries' weights to ours share."""

from collections.abc import Mapping

import numpy as np

from minillm.checks import message, require


class Weights:
    """Arrays by name that are taken out one by one, so that what is missing or left over is noticed."""

    def __init__(self, where: str, weights: Mapping[str, np.ndarray], ignored: tuple[str, ...] = ()):
        self.where = where
        self.left = {name: array for name, array in weights.items() if not name.endswith(ignored)}

    def take(self, name: str) -> np.ndarray:
        """One array; ValueError if there is none of that name."""
        if name not in self.left:
            raise ValueError(message(self.where, "the weights", f"with {name} among them", "none of that name"))
        return self.left.pop(name)

    def done(self) -> None:
        """Refuse what has not been taken."""
        few = ", ".join(sorted(self.left)[:3])
        require(not self.left, self.where, "the weights", "those of this architecture", f"also {few}")
