r"""What the tokenizers of pretrained models have in common, whatever they do with the text between added tokens."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int

from minillm.checks import message, require
from minillm.data.added_tokens import AddedToken, AddedTokens
from minillm.data.frames import Frame, Framed
from minillm.data.tokenizer_base import Tokenizer, as_bytes, field


class PretrainedTokenizer(Tokenizer):
    r"""A vocabulary of texts in the order of their ids, added tokens, roles, and what stands around a text.

    Equation: `special-tokens` ids of their own; `special_id` takes a role (bos, eos, pad, unk, cls, sep, mask) or the text
    Raises: ValueError for tokens that are not distinct texts, or ids outside the vocabulary.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        added: Sequence[AddedToken] = (),
        roles: Mapping[str, int] | None = None,
        frame: Frame | None = None,
    ):
        where = type(self).__name__
        super().__init__(len(vocabulary), ())
        self.vocabulary = list(vocabulary)
        for token, text in enumerate(self.vocabulary):
            require(isinstance(text, str), where, f"token {token}", "a text", text)
            require(is_unicode(text), where, f"token {token}", "valid Unicode", ascii(text))
        require(len(set(self.vocabulary)) == len(self.vocabulary), where, "the vocabulary", "distinct texts", "repeats")
        self.added, self.roles = AddedTokens(added, self._normalise), dict(roles or {})
        self.special_ids = {token.content: token.id for token in added if token.special}
        self.specials = tuple(self.special_ids)
        for name, token in chain(((t.content, t.id) for t in added), self.roles.items()):
            inside = type(token) is int and 0 <= token < len(self.vocabulary)
            require(inside, where, f"the id of {name}", f"in [0, {len(self.vocabulary)})", token)
        for token in added:
            same = self.vocabulary[token.id] == token.content
            require(same, where, f"token {token.id}", repr(token.content), repr(self.vocabulary[token.id]))
        self.frame = frame or Frame()
        Frame.from_lists(self.frame.to_lists(), len(self.vocabulary))
        if "bos" not in self.roles and self.frame.opening:
            self.roles["bos"] = self.frame.opening[0]
        self.adds_bos = self.frame.opening[:1] == (self.roles.get("bos"),)
        self._shown = list(self.vocabulary)  # what decoding shows: of an added token, what it was looked for as
        for token in added:
            self._shown[token.id] = self._normalise(token.content) if token.normalized else token.content
        self._special = frozenset(self.special_ids.values())
        self._id_of = {text: token for token, text in enumerate(self.vocabulary) if token not in self._special}

    # -- what a kind provides --------------------------------------------------------------------------------

    def _normalise(self, text: str) -> str:
        """What happens to the text between added tokens before the normalised ones are looked for."""
        return text

    @abstractmethod
    def _encode_part(self, text: str, first: bool) -> list[int]:
        """The ids of normalised text without added tokens; ``first`` if the sequence begins with it."""

    # -- ids -------------------------------------------------------------------------------------------------

    def special_id(self, name: str) -> int | None:
        """The id of a special token, by its text or by its role."""
        return self.roles.get(name, self.special_ids.get(name))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    # -- encoding --------------------------------------------------------------------------------------------

    def _ids(self, text: str | bytes, *, marks: bool, first: bool = True) -> Int[np.ndarray, " L"]:
        ids: list[int] = []
        for part in self.added.cut(as_bytes(text).decode("utf-8", "surrogateescape"), marks=marks, first=first):
            ids += self._encode_part(part.text, part.first) if part.id is None else [part.id]
        return np.array(ids, np.int64)

    def _encode_bytes(self, data: bytes) -> Int[np.ndarray, " L"]:
        return self._ids(data, marks=False)

    def encode_next(self, text: str | bytes) -> Int[np.ndarray, " L"]:
        return self._ids(text, marks=False, first=False)

    def encode_marked(self, text: str | bytes) -> Int[np.ndarray, " L"]:
        """Ids of a text in which the texts of special tokens are those tokens: for templates, not for what users write."""
        return self._ids(text, marks=True)

    def frame_texts(self, text: str | bytes, second: str | bytes | None = None) -> Framed:
        """Ids and segments of one text or two with the special tokens that the model wants around them.

        Shapes: texts -> (L,) ids and (L,) segments
        """
        return self.frame.around(self.encode(text), None if second is None else self.encode(second))

    # -- files -----------------------------------------------------------------------------------------------

    def _common(self) -> dict[str, Any]:
        return {
            **self._header(),
            "vocabulary": self.vocabulary,
            "added": [list(token) for token in self.added.tokens],
            "roles": self.roles,
            "frame": self.frame.to_lists(),
        }

    @staticmethod
    def _from_common(state: dict[str, Any]) -> dict[str, Any]:
        vocabulary = field(state, "vocabulary", list)
        kinds = [str, int, bool, bool, bool, bool]
        added = field(state, "added", list)
        for token in added:
            sound = isinstance(token, list) and list(map(type, token)) == kinds
            require(sound, "from_dict", "an added token", "[content, id, four flags]", token)
        return {
            "vocabulary": vocabulary,
            "added": [AddedToken(*token) for token in added],
            "roles": field(state, "roles", dict),
            "frame": Frame.from_lists(field(state, "frame", list), len(vocabulary)),
        }

    def _tokens(self, ids: Iterable[SupportsIndex] | np.ndarray, skip_special: bool) -> list[int]:
        return [i for i in self._checked(ids).tolist() if not (skip_special and i in self._special)]


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def token_id(vocabulary: Mapping[str, int], text: object, where: str, what: str) -> int:
    """The id of a token that has to be there."""
    if not isinstance(text, str) or text not in vocabulary:
        raise ValueError(message(where, what, "a token of the vocabulary", repr(text)))
    return vocabulary[text]
