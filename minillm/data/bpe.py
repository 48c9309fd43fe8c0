r"""Byte-pair encoding, over bytes (as tiktoken) or over characters with bytes to fall back on (as sentencepiece)."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Int

from minillm.checks import message, require, require_one_of, require_positive
from minillm.data.merges import GAP, Pair, apply_merges, learn_merges
from minillm.data.tokenizer_base import Tokenizer, as_bytes, field

# Where merges may not cross. Every pattern covers every character, so joining the pieces gives the text back.
# "gpt2": words, numbers and punctuation apart, each with the one space before it. "words": cut at white space only.
SPLITS = {
    "gpt2": re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:_|[^\s\w])+|\s+(?!\S)|\s+"),
    "words": re.compile(r" ?\S+|\s+(?!\S)|\s+"),
    "none": None,
}
ALPHABETS = ("bytes", "characters")
CACHE_SIZE = 1 << 16


class BPETokenizer(Tokenizer):
    r"""Bytes, then learned characters if asked, then one id per merge, then the special tokens.

    Equation: `tokenizer-bpe` repeatedly merge $\arg\max_{(a,b)}\mathrm{count}(ab)$; encode in learned order
    Raises: ValueError for merges of ids that do not exist yet, repeated merges or an unknown ``split``.
    Source: lecture06 (LLaMA table); Sennrich, Haddow and Birch 2016.

    Any bytes survive ``decode_bytes(encode(data))``, valid UTF-8 or not, and whatever the text it was trained on.
    """

    kind = "bpe"

    def __init__(
        self,
        merges: Sequence[Sequence[int]],
        *,
        characters: str = "",
        split: str = "gpt2",
        specials: Sequence[str] = ("bos", "eos", "pad"),
    ):
        require_one_of(split, SPLITS, "BPETokenizer", "split")
        super().__init__(256 + len(characters) + len(merges), specials)
        self.split, self.characters = split, characters
        self.merges = _checked_merges(merges, 256 + len(characters))
        self._made = range(256 + len(characters), 256 + len(characters) + len(merges))
        self._character_ids = _character_ids(characters)
        self._ranks: dict[Pair, int] = {pair: rank for rank, pair in enumerate(self.merges)}
        self._spelling = [bytes([i]) for i in range(256)] + [c.encode("utf-8") for c in characters]
        for a, b in self.merges:
            self._spelling.append(self._spelling[a] + self._spelling[b])
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls,
        text: str | bytes | Iterable[str | bytes],
        vocab_size: int,
        *,
        specials: Sequence[str] = ("bos", "eos", "pad"),
        split: str = "gpt2",
        alphabet: str = "bytes",
        character_coverage: float = 0.9995,
        min_count: int = 2,
    ) -> "BPETokenizer":
        r"""Learn a vocabulary of ``vocab_size`` ids, special tokens included, from text or from several documents.

        Equation: `tokenizer-bpe` $\arg\max_{(a,b)}\mathrm{count}(ab)$, ties to the smallest pair of ids
        Raises: ValueError if vocab_size has no room for the 256 bytes and the special tokens, or if there is no text.

        ``alphabet="characters"`` starts from whole characters, as sentencepiece does: the most frequent ones that
        cover the share ``character_coverage`` of the text get ids, rarer ones fall back on their bytes. The
        vocabulary stays smaller than asked when no pair occurs ``min_count`` times any more.
        """
        where = "BPETokenizer.train"
        require_one_of(split, SPLITS, where, "split")
        require_one_of(alphabet, ALPHABETS, where, "alphabet")
        require_positive(vocab_size, where, "vocab_size", integer=True)
        require_positive(min_count, where, "min_count", integer=True)
        room = vocab_size - 256 - len(tuple(specials))
        require(
            room >= 0, where, "vocab_size", f"at least 256 bytes + {len(tuple(specials))} special tokens", vocab_size
        )
        documents = [text] if isinstance(text, str | bytes | bytearray) else text
        pieces = Counter(chain.from_iterable(_pieces(_as_text(as_bytes(document)), split) for document in documents))
        require(len(pieces) > 0, where, "text", "at least one character", "none", "Check that the corpus was read.")
        characters = _frequent_characters(pieces, character_coverage, room) if alphabet == "characters" else ""
        ids = _character_ids(characters)
        words: Counter[tuple[int, ...]] = Counter()
        for piece, count in pieces.items():
            words[tuple(_symbols(piece, ids))] += count
        merges = learn_merges(words, room - len(characters), 256 + len(characters), min_count)
        return cls(merges, characters=characters, split=split, specials=specials)

    def _encode_bytes(self, data: bytes) -> Int[np.ndarray, " L"]:
        pieces = _pieces(_as_text(data), self.split)
        return np.fromiter(chain.from_iterable(map(self._encode_piece, pieces)), np.int64)

    def _encode_piece(self, piece: str) -> list[int]:
        ids = self._cache.get(piece)
        if ids is None:
            ids = apply_merges(_symbols(piece, self._character_ids), self._ranks, self._made)
            if len(self._cache) >= CACHE_SIZE:
                self._cache.clear()
            self._cache[piece] = ids
        return ids

    def _spell(self, ids: Int[np.ndarray, " L"]) -> bytes:
        return b"".join([self._spelling[i] for i in ids])

    def to_dict(self) -> dict[str, Any]:
        return {
            **self._header(),
            "split": self.split,
            "characters": self.characters,
            "merges": [list(pair) for pair in self.merges],
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "BPETokenizer":
        return cls(
            field(state, "merges", list),
            characters=field(state, "characters", str),
            split=field(state, "split", str),
            specials=field(state, "specials", list),
        )


def bytes_per_token(tokenizer: Tokenizer, text: str | bytes) -> float:
    """How many bytes of this text a token stands for on average; loss in nats / ln 2 / this = bits per byte."""
    data = as_bytes(text)
    require(len(data) > 0, "bytes_per_token", "text", "at least one byte", "none")
    return len(data) / len(tokenizer.encode(data))


def _as_text(data: bytes) -> str:
    # bytes that are not UTF-8 become lone surrogates, which no valid text holds, so that nothing is lost
    return data.decode("utf-8", "surrogateescape")


def _pieces(text: str, split: str) -> Sequence[str]:
    pattern = SPLITS[split]
    if pattern is None:
        return [text] if text else []
    return pattern.findall(text)


def _symbols(piece: str, character_ids: dict[str, int]) -> Sequence[int]:
    if not character_ids:
        return piece.encode("utf-8", "surrogateescape")
    symbols: list[int] = []
    for character in piece:
        known = character_ids.get(character)
        symbols += [known] if known is not None else character.encode("utf-8", "surrogateescape")
    return symbols


def _needs_id(character: str) -> bool:
    # ASCII is its own byte, and a lone surrogate stands for a byte that is not UTF-8
    return character > "\x7f" and not "\ud800" <= character <= "\udfff"


def _character_ids(characters: str) -> dict[str, int]:
    for character in characters:
        require(_needs_id(character), "BPETokenizer", "characters", "valid and not ASCII", repr(character))
    require(len(set(characters)) == len(characters), "BPETokenizer", "characters", "distinct", repr(characters))
    return {character: 256 + i for i, character in enumerate(characters)}


def _frequent_characters(pieces: Counter[str], coverage: float, room: int) -> str:
    require(0 <= coverage <= 1, "BPETokenizer.train", "character_coverage", "a share in [0, 1]", coverage)
    counts: Counter[str] = Counter()
    for piece, count in pieces.items():
        for character in piece:
            counts[character] += count
    chosen, covered, wanted = [], 0, coverage * counts.total()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted:
            break
        covered += count
        if _needs_id(character):
            chosen.append(character)
    return "".join(chosen[:room])


def _checked_merges(merges: Sequence[Sequence[int]], first_merge: int) -> list[Pair]:
    checked: list[Pair] = []
    seen: set[Pair] = set()
    for rank, pair in enumerate(merges):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(i) is int for i in pair)
        if not is_pair or not all(GAP < i < first_merge + rank for i in pair) or tuple(pair) in seen:
            raise ValueError(
                message("BPETokenizer", f"merge {rank}", f"a new pair of ids below {first_merge + rank}", repr(pair))
            )
        checked.append((pair[0], pair[1]))
        seen.add(checked[-1])
    return checked
