r"""What BERT does to a text before it looks for pieces: characters cleaned, spread, stripped, lowered; cut into words."""

import unicodedata
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from minillm.data.pretokenize import SPACES

# The library knows the categories of Unicode 8, and Python those of its own version; these ranges came in between.
YOUNG_MARKS = """
    5C8-5C9 7FD 897-89F 8CA-8E1 9FE AFA-AFF B53-B55 C04 C3C D00 D3B-D3C D81 EBA ECE 180F 1885-1886 1ABF-1AF0
    1DF6-1DFB A82C A8C5 A8FF A9BD 10D24-10D27 10D69-10D6D 10EAB-10EAC 10ECB-10ECF 10EF0-10EFF 10F46-10F50
    10F82-10F85 11070 11073-11074 110C2 111C9 111CF 1123E 11241 1133B 113BB-113C0 113CE 113D0 113D2 113E1-113E2
    11438-1143F 11442-11444 11446 1145E 1182F-11837 11839-1183A 1193B-1193C 1193E 11943 119D4-119D7 119DA-119DB
    119E0 11A01-11A0A 11A33-11A38 11A3B-11A3E 11A47 11A51-11A56 11A59-11A5B 11A8A-11A96 11A98-11A99 11B60
    11B62-11B64 11B66 11C30-11C36 11C38-11C3D 11C3F 11C92-11CA7 11CAA-11CB0 11CB2-11CB3 11CB5-11CB6 11D31-11D36
    11D3A 11D3C-11D3D 11D3F-11D45 11D47 11D90-11D91 11D95 11D97 11DF0 11EF3-11EF4 11F00-11F01 11F36-11F3A 11F40
    11F42 11F5A 13440 13447-13455 1611E-16129 1612D-1612F 16F4F 16FE4 1CF00-1CF2D 1CF30-1CF46 1D127-1D128
    1D25B-1D25C 1E000-1E006 1E008-1E018 1E01B-1E021 1E023-1E024 1E026-1E02A 1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF
    1E4EC-1E4EF 1E5EE-1E5EF 1E6E3 1E6E6 1E6EE-1E6EF 1E6F5 1E944-1E94A
"""
YOUNG_PUNCTUATION = """
    61D 9FD A76 C77 C84 1B4E-1B4F 1B7D-1B7F 2E43-2E4F 2E52-2E5D 2E60-2E63 10D6E 10EAD 10ED0 10F55-10F59 10F86-10F89
    113D4-113D5 113D7-113D8 1144B-1144F 1145A-1145B 1145D 11660-1166C 116B9 1183B 11944-11946 119E2 11A3F-11A46
    11A9A-11A9C 11A9E-11AA2 11B00-11B09 11BE1 11C41-11C45 11C70-11C71 11EF7-11EF8 11F43-11F4F 11FFF 12FF1-12FF2
    16D6D-16D6F 16E97-16E9A 16FE2 1E5FF 1E95E-1E95F
"""
YOUNG_CONTROLS = "890-891 8E2 110CD 13430-1343F"
OLD_MARKS, OLD_PUNCTUATION = "\u1734\U0001171e", "\u166d\U000111c9"  # and these were something else then
YOUNG_WHOLES = "105C9 105E4 11383 11385 1138E 11391 113C5 113C7-113C8 11938 16121-16128 16D68-16D6A"  # in no parts yet
CHINESE = "3400-4DBF 4E00-9FFF F900-FAFF 20000-2A6DF 2A700-2B73F 2B740-2B81F 2B920-2CEAF 2F800-2FA1F"
ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


@lru_cache(maxsize=8)
def codes(ranges: str) -> frozenset[int]:
    """The numbers of the characters in a list of ranges."""
    found: set[int] = set()
    for run in ranges.split():
        first, _, last = run.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


def is_control(character: str) -> bool:
    """Control, format, surrogate and private characters; tab and line breaks are white space."""
    if character in "\t\n\r":
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs") and ord(character) not in codes(YOUNG_CONTROLS)


def is_mark(character: str) -> bool:
    """Marks that take no room of their own, such as accents."""
    mark = unicodedata.category(character) == "Mn" and ord(character) not in codes(YOUNG_MARKS)
    return mark or character in OLD_MARKS


def is_punctuation(character: str) -> bool:
    """Punctuation, and the symbols of ASCII."""
    if character in ASCII_PUNCTUATION or character in OLD_PUNCTUATION:
        return True
    return unicodedata.category(character)[0] == "P" and ord(character) not in codes(YOUNG_PUNCTUATION)


def decomposed(text: str) -> str:
    """Characters with accents as letters and marks (NFD)."""
    runs = groupby(text, lambda c: ord(c) in codes(YOUNG_WHOLES))
    return "".join("".join(run) if whole else unicodedata.normalize("NFD", "".join(run)) for whole, run in runs)


class BertText(NamedTuple):
    """Which of the steps are taken; ``accents``: whether they are stripped, as in lowered text if it is None."""

    clean: bool = True
    chinese: bool = True
    accents: bool | None = None
    lower: bool = True

    def normalise(self, text: str) -> str:
        """Clean the text, put spaces around Chinese characters, take accents off, lower it."""
        if self.clean:
            kept = (c for c in text if c not in "\0\ufffd" and not is_control(c))
            text = "".join(" " if c in SPACES else c for c in kept)
        if self.chinese:
            text = "".join(f" {c} " if ord(c) in codes(CHINESE) else c for c in text)
        if self.lower if self.accents is None else self.accents:
            text = "".join(c for c in decomposed(text) if not is_mark(c))
        return "".join(c.lower() for c in text) if self.lower else text  # one by one: no final sigma


def words(text: str) -> list[str]:
    """The text cut at white space, which goes, and around each punctuation mark, which stays."""
    found = []
    for kind, run in groupby(text, lambda c: 0 if c in SPACES else 1 if is_punctuation(c) else 2):
        characters = list(run)
        found += [] if kind == 0 else characters if kind == 1 else ["".join(characters)]
    return found
