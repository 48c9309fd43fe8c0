r"""The byte-level BPE tokenizers that pretrained models come with: GPT-2's, LLaMA 3's, SmolLM's.

They differ from one that is trained here in what was left to their makers: the ids are in any order, special tokens
stand anywhere among them, some bytes may have no id at all, and the cut into pieces is a rule of their own.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int

from minillm.checks import message, require
from minillm.data.merges import apply_merges, ranked
from minillm.data.pretokenize import RULES, split_text
from minillm.data.tokenizer_base import Tokenizer, field

CACHE_SIZE = 1 << 16


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in such vocabularies: itself if it can be seen, else one from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in seen else next(rest)) for byte in range(256)]


class PretrainedBPE(Tokenizer):
    r"""A vocabulary of byte strings, merges in the order in which they apply, and special tokens.

    Equation: `tokenizer-bpe` encode by the lowest merge present, again and again
    Equation: `special-tokens` reached by their ids only; `special_id` takes a role (bos, eos, pad) or the text
    Raises: ValueError for a vocabulary that is not one of byte-level BPE, merges of unknown tokens, an unknown rule.
    Source: lecture06 (LLaMA table); Radford et al. 2019.
    Differs: a byte without an id is left out of the encoding, as in the library the tokenizers were made with.

    ``whole_pieces``: a piece that is itself in the vocabulary is one token, whatever the merges say (LLaMA 3).
    """

    kind = "pretrained-bpe"

    def __init__(
        self,
        vocabulary: Sequence[str],
        merges: Sequence[Sequence[str]],
        *,
        specials: Mapping[str, int],
        roles: Mapping[str, int] | None = None,
        split: str = "gpt2",
        adds_bos: bool = False,
        whole_pieces: bool = False,
    ):
        where = "PretrainedBPE"
        require(split in RULES, where, "split", "one of " + ", ".join(RULES), split)
        super().__init__(len(vocabulary), ())
        self.specials = tuple(specials)
        self.split, self.adds_bos, self.whole_pieces = split, adds_bos, whole_pieces
        self.vocabulary, self.merges = list(vocabulary), [(first, second) for first, second in merges]
        self.special_ids, self.roles = dict(specials), dict(roles or {})
        for name, token in chain(self.special_ids.items(), self.roles.items()):
            inside = type(token) is int and 0 <= token < len(vocabulary)
            require(inside, where, f"the id of {name}", f"in [0, {len(vocabulary)})", token)
        self._special_names = {token: name for name, token in self.special_ids.items()}
        self._spelling = self._spellings()
        id_of = {spelled: token for token, spelled in enumerate(self._spelling) if token not in self._special_names}
        self._id_of = id_of
        self._byte_ids = [id_of.get(bytes([byte])) for byte in range(256)]
        ordinary = {text: i for i, text in enumerate(self.vocabulary) if i not in self._special_names}
        self._ranks, self._made = ranked(self.merges, ordinary, where)
        self._cache: dict[str, list[int]] = {}

    def _spellings(self) -> list[bytes]:
        """The bytes of every token; special ones spell nothing."""
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        spelled = []
        for token, text in enumerate(self.vocabulary):
            if token in self._special_names:
                spelled.append(b"")
                continue
            try:
                spelled.append(bytes([byte_of[character] for character in text]))
            except (KeyError, TypeError) as error:
                what, wanted = f"token {token}", "spelled in the alphabet of byte-level BPE"
                raise ValueError(message("PretrainedBPE", what, wanted, repr(text))) from error
        return spelled

    def special_id(self, name: str) -> int | None:
        """The id of a special token, by its text or by its role: bos, eos, pad."""
        return self.roles.get(name, self.special_ids.get(name))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def _encode_bytes(self, data: bytes) -> Int[np.ndarray, " L"]:
        pieces = split_text(data.decode("utf-8", "surrogateescape"), self.split)
        return np.fromiter(chain.from_iterable(map(self._encode_piece, pieces)), np.int64)

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._cache.get(piece)
        if ids is None:
            data = piece.encode("utf-8", "surrogateescape")
            if self.whole_pieces and data in self._id_of:
                ids = [self._id_of[data]]
            else:
                symbols = [token for token in map(self._byte_ids.__getitem__, data) if token is not None]
                ids = apply_merges(symbols, self._ranks, self._made)
            if len(self._cache) >= CACHE_SIZE:
                self._cache.clear()
            self._cache[piece] = ids
        return ids

    def _spell(self, ids: Int[np.ndarray, " L"]) -> bytes:
        return b"".join([self._spelling[i] for i in ids])

    def decode(
        self, ids: Iterable[SupportsIndex] | np.ndarray, *, errors: str = "replace", skip_special: bool = True
    ) -> str:
        """The text that the ids spell; with ``skip_special=False`` special tokens show as their texts."""
        if skip_special:
            return self.decode_bytes(ids).decode("utf-8", errors)
        parts = [
            self._special_names[token].encode("utf-8") if token in self._special_names else self._spelling[token]
            for token in self._checked(ids).tolist()
        ]
        return b"".join(parts).decode("utf-8", errors)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self._header(),
            "vocabulary": self.vocabulary,
            "merges": [list(pair) for pair in self.merges],
            "special_ids": self.special_ids,
            "roles": self.roles,
            "split": self.split,
            "adds_bos": self.adds_bos,
            "whole_pieces": self.whole_pieces,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "PretrainedBPE":
        return cls(
            field(state, "vocabulary", list),
            field(state, "merges", list),
            specials=field(state, "special_ids", dict),
            roles=field(state, "roles", dict),
            split=field(state, "split", str),
            adds_bos=field(state, "adds_bos", bool),
            whole_pieces=field(state, "whole_pieces", bool),
        )
