r"""WordPiece: a word is the longest piece of the vocabulary it begins with, then the longest that continues it ("##")."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from minillm.checks import require
from minillm.data.added_tokens import AddedToken
from minillm.data.bert_text import BertText, words
from minillm.data.frames import Frame
from minillm.data.pretrained_base import PretrainedTokenizer
from minillm.data.tokenizer_base import field

CACHE_SIZE = 1 << 16
# What decoding does to each token, in this order; "do not" cannot stand in one token, and is there as in the library.
CLEAN = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " do not": " don't"}
CLEAN |= {" 's": "'s", " 've": "'ve", " 're": "'re"}


class WordPiece(PretrainedTokenizer):
    r"""The tokenizer of BERT.

    Equation: `special-tokens` `frame_texts` puts [CLS] and [SEP] around one text or two, with segments 0 and 1
    Raises: ValueError for an unknown token that is not in the vocabulary, or a length below 0.
    Source: Wu et al. 2016; Devlin et al. 2019.
    Differs: characters younger than this Python's Unicode tables have no lower case and no accents.

    What comes back is not the text: white space becomes single spaces (and those at punctuation are guesses), control
    characters go, and with them case and accents where they are taken off; a word that no pieces make up, or that is
    longer than ``longest`` characters, is the unknown token, of which nothing comes back.
    """

    kind = "wordpiece"

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        added: Sequence[AddedToken] = (),
        roles: Mapping[str, int] | None = None,
        frame: Frame | None = None,
        text: BertText | None = None,
        unknown: str = "[UNK]",
        prefix: str = "##",
        longest: int = 100,
        cleanup: bool = True,
    ):
        where = "WordPiece"
        self.text = text or BertText()
        super().__init__(vocabulary, added=added, roles=roles, frame=frame)
        ids = {spelled: token for token, spelled in enumerate(self.vocabulary)}
        require(unknown in ids, where, "the unknown token", "in the vocabulary", repr(unknown))
        require(type(longest) is int and longest >= 0, where, "the longest word", "a count of characters", longest)
        self.unknown, self.prefix, self.longest, self.cleanup = unknown, prefix, longest, cleanup
        self._unknown_id = ids[unknown]
        self._most = max(map(len, self._id_of), default=0)  # no piece is longer, so none is looked for
        self._cache: dict[str, list[int]] = {}

    def _normalise(self, text: str) -> str:
        return self.text.normalise(text)

    def _encode_part(self, text: str, first: bool) -> list[int]:
        ids: list[int] = []
        for word in words(text):
            found = self._cache.get(word)
            if found is None:
                found = self._pieces(word)
                if len(self._cache) >= CACHE_SIZE:
                    self._cache.clear()
                self._cache[word] = found
            ids += found
        return ids

    def _pieces(self, word: str) -> list[int]:
        if len(word) > self.longest:
            return [self._unknown_id]
        ids, start = [], 0
        while start < len(word):
            prefix = self.prefix if start else ""
            for stop in range(min(len(word), start + self._most), start, -1):
                token = self._id_of.get(prefix + word[start:stop])
                if token is not None:
                    break
            else:
                return [self._unknown_id]
            ids.append(token)
            start = stop
        return ids

    def _spell(self, ids: np.ndarray) -> bytes:
        return self.decode(ids).encode("utf-8")

    def decode_bytes(self, ids: Iterable[SupportsIndex] | np.ndarray) -> bytes:
        return self.decode(ids).encode("utf-8")

    def decode(
        self, ids: Iterable[SupportsIndex] | np.ndarray, *, errors: str = "replace", skip_special: bool = True
    ) -> str:
        """Words with a space between; ``errors`` has no part in it, as tokens are whole characters."""
        text = ""
        for i, token in enumerate(self._tokens(ids, skip_special)):
            spelled = self._shown[token]
            if i:
                spelled = spelled[len(self.prefix) :] if spelled.startswith(self.prefix) else " " + spelled
            for old, new in CLEAN.items() if self.cleanup else ():
                spelled = spelled.replace(old, new)
            text += spelled
        return text

    def to_dict(self) -> dict[str, Any]:
        return {
            **self._common(),
            "text": list(self.text),
            "unknown": self.unknown,
            "prefix": self.prefix,
            "longest": self.longest,
            "cleanup": self.cleanup,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "WordPiece":
        text = field(state, "text", list)
        sound = len(text) == 4 and all(
            step in (True, False) or (i == 2 and step is None) for i, step in enumerate(text)
        )
        require(sound, "from_dict", "the steps", "four of true and false (accents: or null)", text)
        return cls(
            **cls._from_common(state),
            text=BertText(*text),
            unknown=field(state, "unknown", str),
            prefix=field(state, "prefix", str),
            longest=field(state, "longest", int),
            cleanup=field(state, "cleanup", bool),
        )
