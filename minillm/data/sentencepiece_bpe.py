r"""BPE over characters with "▁" for the space, as Llama 2, TinyLlama, Mistral and Gemma have it.

A space becomes "▁", one more stands in front of the text so that a word is the same token at the beginning as within,
merges go over the whole text, and a character without a token is spelled by tokens for its bytes, `<0x0A>`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from minillm.checks import message, require
from minillm.data.added_tokens import AddedToken
from minillm.data.frames import Frame
from minillm.data.merges import apply_merges, ranked, ranked_by_score
from minillm.data.pretrained_base import PretrainedTokenizer
from minillm.data.tokenizer_base import field

SPACE = "▁"
PREFIXES = ("each", "always", "first", "never")
CACHE_SIZE, LONGEST_CACHED = 1 << 16, 256
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_WORDS = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")  # a cut that no merge crosses if no token has a space inside
_SPLIT = re.compile(f"{SPACE}[^{SPACE}]*|[^{SPACE}]+")


class Spaces(NamedTuple):
    """What becomes of spaces.

    ``prefix``: "▁" goes in front of "each" stretch of text between added tokens, "always" (of each that does not begin
    with it), of the "first" of the sequence only, or "never". ``early``: the spaces are replaced by the normaliser, so
    before added tokens that want normalised text are looked for. ``words``: no merge goes into a "▁" from the left.
    ``stripped``: so many spaces at the beginning of a text are taken away when it is decoded.
    """

    prefix: str = "each"
    early: bool = True
    words: bool = False
    stripped: int = 1


class SentencePieceBPE(PretrainedTokenizer):
    r"""A vocabulary of texts with "▁" for the space; merges in their order, or scores of the tokens.

    Equation: `tokenizer-bpe` encode by the lowest merge present, again and again
    Equation: `special-tokens` reached by their ids only; `encode_marked` finds their texts, too
    Raises: ValueError for merges of unknown tokens, scores that are not one each, an unknown token that is none.
    Source: lecture06 (LLaMA table); Sennrich, Haddow and Birch 2016; Kudo and Richardson 2018.
    Differs: bytes that are no character are decoded as Python does, where the library the files are made for puts one
        U+FFFD for each byte of the run.

    A text comes back exactly, but for "▁" itself (it comes back as a space), for characters without a token where the
    vocabulary lacks bytes, and for what the prefix does: "each" and "always" put a space behind every added token, with
    "always" and "first" a space at the beginning is lost, and with "never" one is lost if decoding strips one.
    """

    kind = "sentencepiece-bpe"

    def __init__(
        self,
        vocabulary: Sequence[str],
        merges: Sequence[Sequence[str]] | None = None,
        *,
        scores: Sequence[float] | None = None,
        added: Sequence[AddedToken] = (),
        roles: Mapping[str, int] | None = None,
        frame: Frame | None = None,
        spaces: Spaces | None = None,
        unknown: str | None = None,
        fuse_unknown: bool = True,
        byte_fallback: bool = True,
        whole_pieces: bool = False,
    ):
        where = "SentencePieceBPE"
        self.spaces = spaces or Spaces()
        sound = self.spaces.prefix in PREFIXES and (self.spaces.prefix != "each" or self.spaces.early)
        require(sound, where, "the prefix", "one of " + ", ".join(PREFIXES) + " ('each' is early)", self.spaces)
        stripped = self.spaces.stripped
        require(type(stripped) is int and stripped >= 0, where, "the stripped spaces", "a count", stripped)
        super().__init__(vocabulary, added=added, roles=roles, frame=frame)
        require((merges is None) != (scores is None), where, "merges or scores", "one of the two", "both or neither")
        self.merges = None if merges is None else [(first, second) for first, second in merges]
        self.scores = None if scores is None else [float(score) for score in scores]
        self.unknown, self.fuse_unknown, self.byte_fallback = unknown, fuse_unknown, byte_fallback
        self.whole_pieces = whole_pieces
        ids = {text: token for token, text in enumerate(self.vocabulary)}
        require(unknown is None or unknown in ids, where, "the unknown token", "in the vocabulary", repr(unknown))
        self._unknown_id = None if unknown is None else ids[unknown]
        self._byte_ids = [self._id_of.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._spelling = [self._spelled(text) for text in self._shown]
        if self.merges is not None:
            self._ranks, self._made = ranked(self.merges, self._id_of, where, last=True)
        else:
            n = len(self.scores or ())
            require(n == len(self.vocabulary), where, "the scores", f"{len(self.vocabulary)}, one each", str(n))
            mergeable = {text: i for text, i in self._id_of.items() if i != self._unknown_id and not _is_byte(text)}
            self._ranks, self._made = ranked_by_score({t: (self.scores or [])[i] for t, i in mergeable.items()}, ids)
        crossing = re.compile(f"[^{SPACE}]{SPACE}")
        self._in_words = SPACE in self._id_of and not any(crossing.search(self.vocabulary[i]) for i in self._made)
        self._cache: dict[str, list[int]] = {}

    @staticmethod
    def _spelled(text: str) -> bytes:
        byte = _BYTE.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode("utf-8")

    # -- encoding --------------------------------------------------------------------------------------------

    def _normalise(self, text: str) -> str:
        if not self.spaces.early:
            return text
        return (SPACE if text and self.spaces.prefix == "each" else "") + text.replace(" ", SPACE)

    def _encode_part(self, text: str, first: bool) -> list[int]:
        text, prefix = text.replace(" ", SPACE), self.spaces.prefix
        if (prefix == "always" or (prefix == "first" and first)) and not text.startswith(SPACE):
            text = SPACE + text
        pieces = _SPLIT.findall(text) if self.spaces.words else [text]
        return [token for piece in pieces for token in self._encode_piece(piece)]

    def _encode_piece(self, piece: str) -> list[int]:
        if self.whole_pieces and piece in self._id_of:
            return [self._id_of[piece]]
        words = _WORDS.findall(piece) if self._in_words else [piece]
        return [token for word in words for token in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            ids = apply_merges(self._symbols(word), self._ranks, self._made)
            if len(word) <= LONGEST_CACHED:
                if len(self._cache) >= CACHE_SIZE:
                    self._cache.clear()
                self._cache[word] = ids
        return ids

    def _symbols(self, word: str) -> list[int]:
        """A token for each character, tokens for its bytes, or the unknown one; a run of these may be one token."""
        ids: list[int] = []
        waiting = False  # an unknown token comes before the next known character, as in the library
        for character in word:
            token = self._id_of.get(character)
            if token is None:
                spelled = self._bytes_of(character)
                if spelled or self._unknown_id is None:
                    ids += spelled
                    continue
                if waiting and not self.fuse_unknown:
                    ids.append(self._unknown_id)
                waiting = True
                continue
            if waiting and self._unknown_id is not None:
                ids.append(self._unknown_id)
            waiting = False
            ids.append(token)
        return [*ids, self._unknown_id] if waiting and self._unknown_id is not None else ids

    def _bytes_of(self, character: str) -> list[int]:
        if not self.byte_fallback:
            return []
        spelled = [self._byte_ids[byte] for byte in character.encode("utf-8", "surrogateescape")]
        return [] if None in spelled else [token for token in spelled if token is not None]

    # -- decoding --------------------------------------------------------------------------------------------

    def _spell(self, ids: np.ndarray) -> bytes:
        return b"".join([self._spelling[i] for i in ids])

    def decode_next(self, ids: Iterable[SupportsIndex] | np.ndarray) -> bytes:
        return self._spell(np.array(self._tokens(ids, skip_special=True), np.int64))

    def decode_bytes(self, ids: Iterable[SupportsIndex] | np.ndarray) -> bytes:
        return self._strip(self.decode_next(ids))

    def decode(
        self, ids: Iterable[SupportsIndex] | np.ndarray, *, errors: str = "replace", skip_special: bool = True
    ) -> str:
        """The text that the ids spell; with ``skip_special=False`` special tokens show as their texts."""
        spelled = self._spell(np.array(self._tokens(ids, skip_special), np.int64))
        return self._strip(spelled).decode("utf-8", errors)

    def _strip(self, spelled: bytes) -> bytes:
        spaces = len(spelled) - len(spelled.lstrip(b" "))
        return spelled[min(spaces, self.spaces.stripped) :]

    # -- files -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {
            **self._common(),
            "merges": None if self.merges is None else [list(pair) for pair in self.merges],
            "scores": self.scores,
            "spaces": list(self.spaces),
            "unknown": self.unknown,
            "fuse_unknown": self.fuse_unknown,
            "byte_fallback": self.byte_fallback,
            "whole_pieces": self.whole_pieces,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "SentencePieceBPE":
        spaces = field(state, "spaces", list)
        require(list(map(type, spaces)) == [str, bool, bool, int], "from_dict", "spaces", "a prefix and three", spaces)
        unknown = state.get("unknown")
        require(unknown is None or isinstance(unknown, str), "from_dict", "the unknown token", "a text", unknown)
        merges, scores = state.get("merges"), state.get("scores")
        try:
            return cls(
                **cls._from_common(state),
                merges=merges,
                scores=scores,
                spaces=Spaces(*spaces),
                unknown=unknown,
                fuse_unknown=field(state, "fuse_unknown", bool),
                byte_fallback=field(state, "byte_fallback", bool),
                whole_pieces=field(state, "whole_pieces", bool),
            )
        except TypeError as error:
            wanted = "pairs of texts, and numbers"
            raise ValueError(message("from_dict", "merges and scores", wanted, f"others ({error})")) from error


def _is_byte(text: str) -> bool:
    return _BYTE.fullmatch(text) is not None
