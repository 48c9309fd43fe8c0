r"""Tokens that are looked for in a text before anything else happens to it: special ones, and whole words of a model."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from minillm.data.pretokenize import SPACES

_SPACES = "".join(SPACES)


class AddedToken(NamedTuple):
    """One such token; ``normalized`` ones are looked for after the normaliser, ``lstrip`` and ``rstrip`` eat space."""

    content: str
    id: int
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False


class Part(NamedTuple):
    """A stretch of a text: an added token's id, or text between them; ``first`` if the text begins with it."""

    text: str
    id: int | None
    first: bool


class AddedTokens:
    """Cuts a text at its added tokens, the leftmost first and of several the longest.

    A special token that text happens to spell is text, unless ``marks`` asks for it: what a user writes must not be
    able to end a turn. The others are found in any case.
    """

    def __init__(self, tokens: Sequence[AddedToken], normalise: Callable[[str], str]):
        self.tokens, self._normalise = tuple(tokens), normalise
        self._early = _finder({t.content: t for t in tokens if not t.normalized})
        self._late = _finder({normalise(t.content): t for t in tokens if t.normalized})

    def cut(self, text: str, *, marks: bool, first: bool = True) -> Iterator[Part]:
        """The parts of a text in order, normalised; ``first`` says whether it is the beginning of the sequence."""
        for part in _cut(Part(text, None, first), self._early, marks):
            if part.id is None:
                yield from _cut(part._replace(text=self._normalise(part.text)), self._late, marks)
            else:
                yield part


class _Finder(NamedTuple):
    pattern: re.Pattern
    tokens: dict[str, AddedToken]


def _finder(tokens: dict[str, AddedToken]) -> _Finder | None:
    tokens = {spelled: token for spelled, token in tokens.items() if spelled}
    if not tokens:
        return None
    longest_first = sorted(tokens, key=lambda spelled: len(spelled.encode("utf-8", "surrogatepass")), reverse=True)
    return _Finder(re.compile("|".join(map(re.escape, longest_first))), tokens)


def _cut(part: Part, finder: _Finder | None, marks: bool) -> Iterator[Part]:
    text, done = part.text, 0
    for found in finder.pattern.finditer(text) if finder else ():
        token = finder.tokens[found.group()] if finder else None
        if token is None or (token.special and not marks):
            continue
        start, stop = found.span()
        if token.lstrip:
            start = max(done, len(text[:start].rstrip(_SPACES)))
        if token.rstrip:
            stop = len(text) - len(text[stop:].lstrip(_SPACES))
        if done < start:
            yield Part(text[done:start], None, part.first and done == 0)
        yield Part(text[start:stop], token.id, False)
        done = stop
    if done < len(text):
        yield Part(text[done:], None, part.first and done == 0)
