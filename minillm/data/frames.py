r"""What a model wants around its texts: [CLS] A [SEP] B [SEP] with segments 0 and 1, or a beginning of sequence."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from minillm.checks import require

TEXTS = ("A", "B")
Slot = tuple[str | tuple[int, ...], int]  # the text A or B, or ids; and the segment


class Framed(NamedTuple):
    """Ids with their segments (token type ids), both (L,)."""

    ids: Int[np.ndarray, " L"]
    segments: Int[np.ndarray, " L"]


class Frame(NamedTuple):
    """The order in which special ids and texts stand, for one text and for two."""

    single: tuple[Slot, ...] = (("A", 0),)
    pair: tuple[Slot, ...] = (("A", 0), ("B", 1))

    @property
    def opening(self) -> tuple[int, ...]:
        """The special ids before a single text."""
        ids: tuple[int, ...] = ()
        for what, _ in self.single:
            if isinstance(what, str):
                break
            ids += what
        return ids

    def around(self, first: Int[np.ndarray, " L"], second: Int[np.ndarray, " M"] | None = None) -> Framed:
        """One text or two in their frame."""
        texts = {"A": first, "B": second}
        ids, segments = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for what, segment in self.single if second is None else self.pair:
            found = texts[what] if isinstance(what, str) else np.array(what, np.int64)
            assert found is not None
            ids.append(found)
            segments.append(np.full(len(found), segment, np.int64))
        return Framed(np.concatenate(ids), np.concatenate(segments))

    def to_lists(self) -> list[Any]:
        """Plain JSON values."""
        return [[[what if isinstance(what, str) else list(what), segment] for what, segment in slots] for slots in self]

    @classmethod
    def from_lists(cls, state: Any, vocab_size: int) -> "Frame":
        """The frame that `to_lists` described, its ids within the vocabulary.

        Raises: ValueError for anything else.
        """
        wanted = "two lists of [text or ids, segment], one for A and one for A and B"
        require(isinstance(state, list) and len(state) == 2, "Frame", "the frame", wanted, state)
        sides = []
        for slots, texts in zip(state, (TEXTS[:1], TEXTS)):
            require(isinstance(slots, list), "Frame", "the frame", wanted, slots)
            side = tuple(_slot(slot, vocab_size, wanted) for slot in slots)
            seen = [what for what, _ in side if isinstance(what, str)]
            require(sorted(seen) == list(texts), "Frame", "the texts in the frame", " and ".join(texts) + " once", seen)
            sides.append(side)
        return cls(*sides)


def _slot(given: Any, vocab_size: int, wanted: str) -> Slot:
    sound = isinstance(given, list) and len(given) == 2 and type(given[1]) is int and given[1] in range(256)
    require(sound and isinstance(given[0], str | list), "Frame", "the frame", wanted, given)
    what, segment = given
    if isinstance(what, str):
        return what, segment
    inside = all(type(i) is int and 0 <= i < vocab_size for i in what)
    require(inside, "Frame", "the ids in the frame", f"in [0, {vocab_size})", what)
    return tuple(what), segment
