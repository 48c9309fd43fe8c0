"""A language model small enough to enumerate: the next token depends on the last one only, in closed form."""

from itertools import product
from types import SimpleNamespace

import numpy as np

from minillm.autograd import Tensor
from minillm.decoding.samplers import probabilities


class ChainCache:
    """Counts positions; one that cannot drop positions goes back to its mark, as running sums do."""

    def __init__(self, batch: int, capacity: int | None, droppable: bool = True):
        self.batch, self.capacity, self.droppable, self.length, self.nbytes = batch, capacity, droppable, 0, 0
        self.read: list[int] = []

    def select(self, rows):
        self.batch = len(rows)

    def save(self):
        return self.length

    def rewind(self, mark, length):
        assert mark <= length <= self.length
        self.length = length if self.droppable or length == self.length else mark
        self.read = self.read[: self.length]


class Chain:
    """Law of the next token = row of a table; ``streams`` are one-hot, so the head is the table."""

    def __init__(self, V: int, seed: int, droppable: bool = True, context: int = 12, size: float = 1.5):
        self.config = SimpleNamespace(vocab_size=V, context=context)
        self.table = np.random.default_rng(seed).normal(0, size, (V, V))
        self.output_weight = Tensor(self.table.T.copy())
        self.droppable, self.passes = droppable, 0

    def new_cache(self, batch, capacity=None):
        return ChainCache(batch, capacity, self.droppable)

    def hidden(self, ids, cache=None):
        if cache is not None:
            assert len(ids) == cache.batch and ids.shape[1] > 0
            assert cache.capacity is None or cache.length + ids.shape[1] <= cache.capacity
            cache.length += ids.shape[1]
            cache.read += ids[0].tolist()
        self.passes += 1
        return Tensor(np.eye(self.config.vocab_size)[ids])

    def laws(self, temperature: float = 1.0) -> np.ndarray:
        """Transition matrix, rows by last token."""
        return probabilities(self.table / temperature)

    def texts(self, last: int, T: int, P: np.ndarray | None = None) -> dict[tuple[int, ...], float]:
        """Probability of every continuation of T tokens."""
        P = self.laws() if P is None else P
        found = {}
        for text in product(range(len(P)), repeat=T):
            path = (last, *text)
            found[text] = float(np.prod([P[a, b] for a, b in zip(path, path[1:], strict=False)]))
        return found
