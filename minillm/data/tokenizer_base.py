r"""What every tokenizer has: ids, special tokens, encoding and decoding, files."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int

from minillm.checks import message, require
from minillm.data.files import read_json, write_json

FORMAT = "minillm-tokenizer"


class Tokenizer(ABC):
    r"""Ordinary ids 0 .. n-1 spell bytes; special ids follow and spell nothing.

    Equation: `special-tokens` reserved ids $n, n+1, \dots$ for BOS, EOS, PAD, CLS, SEP, each with a row of its own
        in the embedding
    Source: notes §8.1, §8.4, §10.3, §10.5.

    A special token is reached by its id only: text that happens to spell its name is encoded as ordinary text.
    """

    kind: str
    adds_bos: bool = False  # whether the model wants its texts to begin with BOS

    def __init__(self, n_ordinary: int, specials: Sequence[str] = ()):
        where = type(self).__name__
        specials = tuple(specials)
        for name in specials:
            require(isinstance(name, str) and name != "", where, "a special token", "a non-empty name", repr(name))
        require(len(set(specials)) == len(specials), where, "the special tokens", "distinct names", specials)
        self.n_ordinary = n_ordinary
        self.specials = specials

    # -- what a kind of tokenizer provides -------------------------------------------------------------------

    @abstractmethod
    def _encode_bytes(self, data: bytes) -> Int[np.ndarray, " L"]: ...

    @abstractmethod
    def _spell(self, ids: Int[np.ndarray, " L"]) -> bytes:
        """The bytes of ordinary ids."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything that is needed to build it again, as plain JSON values."""

    @classmethod
    @abstractmethod
    def from_dict(cls, state: dict[str, Any]) -> "Tokenizer": ...

    # -- ids -------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included: V of the model."""
        return self.n_ordinary + len(self.specials)

    def special_id(self, name: str) -> int | None:
        """The id of a special token, or None if it is not reserved here."""
        return self.n_ordinary + self.specials.index(name) if name in self.specials else None

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, or None."""
        return self.special_id("bos")

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token, or None."""
        return self.special_id("eos")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, or None."""
        return self.special_id("pad")

    # -- encoding and decoding -------------------------------------------------------------------------------

    def encode(self, text: str | bytes, *, bos: bool = False, eos: bool = False) -> Int[np.ndarray, " L"]:
        """Turn text or bytes into ids, framed by BOS and EOS on request.

        Shapes: L characters or bytes -> (L',) int64
        Raises: TypeError unless text is str or bytes; ValueError for a str with lone surrogates or a missing BOS or EOS.
        """
        ids = self._encode_bytes(as_bytes(text))
        front = [self._required_special("bos")] if bos else []
        back = [self._required_special("eos")] if eos else []
        return np.concatenate([np.array(front, np.int64), ids, np.array(back, np.int64)])

    def encode_next(self, text: str | bytes) -> Int[np.ndarray, " L"]:
        """Ids of a text that other tokens precede; some tokenizers put a space in front of the first text only."""
        return self.encode(text)

    def decode_next(self, ids: Iterable[SupportsIndex] | np.ndarray) -> bytes:
        """The bytes that ids add to the text before them; some tokenizers take away the space of a text's beginning."""
        return self.decode_bytes(ids)

    def decode_bytes(self, ids: Iterable[SupportsIndex] | np.ndarray) -> bytes:
        """The exact bytes that the ids spell; special tokens spell none.

        Raises: IndexError for ids outside [0, vocab_size), TypeError for ids that are not integers.
        """
        ids = self._checked(ids)
        return self._spell(ids[ids < self.n_ordinary])

    def decode(
        self, ids: Iterable[SupportsIndex] | np.ndarray, *, errors: str = "replace", skip_special: bool = True
    ) -> str:
        """The text that the ids spell.

        Any sequence of ids is allowed, so the bytes need not be whole characters (one emoji may be several tokens);
        ``errors`` says what becomes of the rest, as in ``bytes.decode``. With ``skip_special=False`` special tokens
        show as ``<name>``.
        """
        if skip_special:
            return self.decode_bytes(ids).decode("utf-8", errors)
        ids = self._checked(ids)
        parts, start = [], 0
        for place in np.flatnonzero(ids >= self.n_ordinary):
            parts.append(self._spell(ids[start:place]).decode("utf-8", errors))
            parts.append(f"<{self.specials[ids[place] - self.n_ordinary]}>")
            start = place + 1
        return "".join(parts) + self._spell(ids[start:]).decode("utf-8", errors)

    def _checked(self, ids: Iterable[SupportsIndex] | np.ndarray) -> Int[np.ndarray, " L"]:
        where = f"{type(self).__name__}.decode"
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        if ids.size == 0:
            ids = ids.astype(np.int64)
        require(bool(np.issubdtype(ids.dtype, np.integer)), where, "ids", "integers", ids, error=TypeError)
        require(ids.ndim == 1, where, "ids", "one sequence", ids, "Decode the rows of a batch one by one.")
        wrong = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if wrong.size:
            place = int(wrong[0])
            raise IndexError(
                message(where, "every id", f"in [0, {self.vocab_size})", f"{int(ids[place])} at position {place}")
            )
        return ids.astype(np.int64, copy=False)

    def _required_special(self, name: str) -> int:
        token = self.special_id(name)
        if token is None:
            raise ValueError(
                message(
                    f"{type(self).__name__}.encode",
                    f"{name}=True",
                    f"asked of a tokenizer that reserves {name!r}",
                    f"one with the special tokens {self.specials}",
                    f'Build it with specials=("{name}", ...).',
                )
            )
        return token

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer as JSON; the old file is replaced only when the new one is complete."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a tokenizer that :meth:`save` wrote, of the class that the file names.

        Raises: FileNotFoundError if there is no file, ValueError if it is corrupt or of another kind.
        """
        state = read_json(path, f"{cls.__name__}.load")
        try:
            tokenizer = tokenizer_from_dict(state)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{cls.__name__}.load: the file {path} is not a usable tokenizer: {error}") from error
        require(isinstance(tokenizer, cls), f"{cls.__name__}.load", f"the file {path}", f"a {cls.__name__}", tokenizer)
        return tokenizer

    def _header(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": 1, "kind": self.kind, "specials": list(self.specials)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, specials={self.specials})"


def as_bytes(text: str | bytes) -> bytes:
    """UTF-8 of a str, bytes as they are."""
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    require(isinstance(text, str), "encode", "text", "str or bytes", text, error=TypeError)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            message(
                "encode",
                "text",
                "valid Unicode",
                f"a lone surrogate at position {error.start}",
                "Read the file with errors='replace', or pass its bytes.",
            )
        ) from error


def field(state: dict[str, Any], name: str, kind: type) -> Any:
    """One entry of a saved tokenizer, checked for being there and for its type."""
    value = state.get(name)
    require(isinstance(value, kind), "from_dict", f"the entry {name!r}", f"a {kind.__name__}", value)
    return value


def tokenizer_from_dict(state: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer that ``to_dict`` described, whatever its kind.

    Raises: ValueError for anything that no ``to_dict`` of this package produced.
    """
    where = "tokenizer_from_dict"
    require(
        isinstance(state, dict) and state.get("format") == FORMAT, where, "the state", f"of format {FORMAT!r}", state
    )
    require(state.get("version") == 1, where, "the version", "1", state.get("version"), "Use a newer minillm.")
    kinds = {cls.kind: cls for cls in _concrete(Tokenizer)}
    kind = state.get("kind")
    require(kind in kinds, where, "the kind", "one of " + ", ".join(sorted(kinds)), repr(kind))
    return kinds[kind].from_dict(state)


def _concrete(cls: type) -> Iterable[type]:
    for child in cls.__subclasses__():
        if hasattr(child, "kind"):
            yield child
        yield from _concrete(child)
