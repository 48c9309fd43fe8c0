r"""Tokenizers that need no training: bytes, and a fixed set of characters.

The one that learns to merge pairs is in :mod:`minillm.data.bpe`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from minillm.checks import require
from minillm.data.tokenizer_base import Tokenizer, field, tokenizer_from_dict

__all__ = ["ByteTokenizer", "CharTokenizer", "Tokenizer", "tokenizer_from_dict"]


class ByteTokenizer(Tokenizer):
    """One id per byte: 256 ids, any input, no training.

    Raises: ValueError for special tokens that are not distinct names.
    """

    kind = "bytes"

    def __init__(self, specials: Sequence[str] = ()):
        super().__init__(256, specials)

    def _encode_bytes(self, data: bytes) -> Int[np.ndarray, " L"]:
        return np.frombuffer(data, np.uint8).astype(np.int64)

    def _spell(self, ids: Int[np.ndarray, " L"]) -> bytes:
        return ids.astype(np.uint8).tobytes()

    def to_dict(self) -> dict[str, Any]:
        return self._header()

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "ByteTokenizer":
        return cls(field(state, "specials", list))


class CharTokenizer(Tokenizer):
    """One id per character of a small fixed alphabet, in the order given.

    Raises: ValueError for an empty or repeating alphabet, and when text with another character is encoded.
    """

    kind = "characters"

    def __init__(self, alphabet: str, specials: Sequence[str] = ()):
        require(len(alphabet) > 0, "CharTokenizer", "the alphabet", "at least one character", repr(alphabet))
        require(
            len(set(alphabet)) == len(alphabet), "CharTokenizer", "the alphabet", "distinct characters", repr(alphabet)
        )
        super().__init__(len(alphabet), specials)
        self.alphabet = alphabet
        self._id_of = {character: i for i, character in enumerate(alphabet)}

    def _encode_bytes(self, data: bytes) -> Int[np.ndarray, " L"]:
        text = data.decode("utf-8")
        for place, character in enumerate(text):
            require(
                character in self._id_of,
                "CharTokenizer.encode",
                "every character",
                f"one of {self.alphabet!r}",
                f"{character!r} at position {place}",
            )
        return np.array([self._id_of[character] for character in text], np.int64)

    def _spell(self, ids: Int[np.ndarray, " L"]) -> bytes:
        return "".join(self.alphabet[i] for i in ids).encode("utf-8")

    def to_dict(self) -> dict[str, Any]:
        return {**self._header(), "alphabet": self.alphabet}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "CharTokenizer":
        return cls(field(state, "alphabet", str), field(state, "specials", list))
