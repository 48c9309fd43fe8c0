"""The cache of attention over an encoder's output, and of a block that has both kinds of attention."""

from typing import Any

import numpy as np

from minillm.autograd import Tensor
from minillm.nn.cache import as_arrays


class CrossCache:
    r"""Keys and values of an encoder's output, projected once and read at every step.

    Equation: `kv-cache-prefix` cross-attention caches the encoder's K, V once
    Shapes: keys (B, H_kv, S, d_k), values (B, H_kv, S, d_v)
    Raises: RuntimeError when it is filled twice or read before; ValueError when a mask of the memory is not (B, S).
    Source: notes §8.4.

    ``store(k, v)`` fills it and ``read()`` gives both; ``filled`` tells which is due. Its length does not grow.
    """

    capacity = None

    def __init__(self) -> None:
        self.keys: np.ndarray | None = None
        self.values: np.ndarray | None = None

    @property
    def filled(self) -> bool:
        """Whether the memory has been projected."""
        return self.keys is not None

    @property
    def length(self) -> int:
        """Positions of the memory, 0 before it is filled."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    def store(self, k: Any, v: Any) -> tuple[Any, Any]:
        """Keep the projected memory, and return it."""
        if self.filled:
            raise RuntimeError("CrossCache: already filled. Make a new cache for another memory.")
        self.keys, self.values = as_arrays("CrossCache", k, v)
        return k, v

    def read(self) -> tuple[Tensor, Tensor]:
        """The projected memory."""
        if self.keys is None or self.values is None:
            raise RuntimeError("CrossCache: nothing stored yet. Call store(k, v) first.")
        return Tensor(self.keys), Tensor(self.values)

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def save(self) -> int:
        """Nothing grows here, so there is nothing to go back to."""
        return self.length

    def rewind(self, mark: int, length: int) -> None:
        """Nothing grows here."""


class BlockCache:
    """What a decoder block with cross-attention keeps: its own positions and the encoder's, once."""

    def __init__(self, attention: Any, cross: CrossCache | None = None):
        self.attention, self.cross = attention, CrossCache() if cross is None else cross

    length = property(lambda self: self.attention.length, doc="Positions of the decoder seen so far.")
    batch = property(lambda self: self.attention.batch, doc="How many sequences.")
    capacity = property(lambda self: self.attention.capacity, doc="Room for the decoder's positions.")
    nbytes = property(lambda self: self.attention.nbytes + self.cross.nbytes, doc="Memory in bytes.")

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        self.attention.select(rows)
        self.cross.select(rows)

    def save(self) -> Any:
        """A mark to come back to."""
        return self.attention.save()

    def rewind(self, mark: Any, length: int) -> None:
        """Forget positions of the decoder."""
        self.attention.rewind(mark, length)
