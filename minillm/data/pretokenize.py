r"""How pretrained tokenizers cut a text into pieces that merges may not cross.

Each rule is one regular expression over letters (Unicode category L), numbers (category N), white space and the
rest, in the form published with its model. Python's `re` knows no categories, so their classes are spelled out here.
"""

import re
import unicodedata
from functools import lru_cache

from minillm.checks import require_one_of

# The property White_Space, which `\s` of Python exceeds by four control characters.
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
SPACES = frozenset(filter(re.compile(f"[{WHITE}]").match, map(chr, range(0x3001))))
LAST_NUMBER = 0x20000  # no character of category N lies beyond


@lru_cache(maxsize=1)
def numbers() -> str:
    """The characters of category N, as ranges of a character class."""
    runs: list[list[int]] = []
    for code in range(LAST_NUMBER):
        if unicodedata.category(chr(code))[0] == "N":
            if runs and runs[-1][1] == code - 1:
                runs[-1][1] = code
            else:
                runs.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in runs)


# {N} number, {L} letter, {O} neither of them nor white space, {S} white space, {T} not white space
GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?{L}+| ?{N}+| ?{O}+|{S}+(?!{T})|{S}+"
TIKTOKEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\w\r\n]|_)?{L}+|{N}{DIGITS}| ?{O}+[\r\n]*|{S}*[\r\n]+|{S}+(?!{T})|{S}+"
RULES = {
    "gpt2": GPT2,
    "smollm": GPT2,  # after each number has been cut off on its own
    "llama3": TIKTOKEN.replace("{DIGITS}", "{1,3}"),
    "qwen2": TIKTOKEN.replace("{DIGITS}", ""),
}


@lru_cache(maxsize=8)
def _pattern(rule: str) -> re.Pattern:
    n = numbers()
    classes = {"N": f"[{n}]", "L": f"[^\\W_{n}]", "O": f"(?:[^\\w{WHITE}]|_)", "S": f"[{WHITE}]", "T": f"[^{WHITE}]"}
    for letter, spelled in classes.items():
        rule = rule.replace("{" + letter + "}", spelled)
    return re.compile(rule)


def split_text(text: str, rule: str) -> list[str]:
    """The pieces of a text by one of the rules; joined, they are the text.

    Raises: ValueError for an unknown rule.
    """
    require_one_of(rule, RULES, "split_text", "the rule")
    pattern = _pattern(RULES[rule])
    if rule != "smollm":
        return pattern.findall(text)
    return [piece for part in _pattern("({N})").split(text) if part for piece in pattern.findall(part)]
