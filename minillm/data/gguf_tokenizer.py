r"""The tokenizer inside a GGUF file."""

import numpy as np

from minillm.checks import message, require
from minillm.data.added_tokens import AddedToken
from minillm.data.frames import Frame
from minillm.data.gguf import GGUF
from minillm.data.pretrained_bpe import PretrainedBPE
from minillm.data.sentencepiece_bpe import SentencePieceBPE, Spaces

# The name of a rule for cutting text, as the files have it, and ours.
SPLITS = {
    "smollm": "smollm",
    "gpt-2": "gpt2",
    "default": "gpt2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "qwen2": "qwen2",
}
WHERE = "tokenizer_from_gguf"
NORMAL, UNKNOWN, CONTROL, ADDED = 1, 2, 3, 4  # kinds of tokens; control tokens spell nothing


def tokenizer_from_gguf(file: GGUF) -> PretrainedBPE | SentencePieceBPE:
    """The tokenizer that a GGUF file describes: byte-level BPE, or SentencePiece's, which merges by scores.

    Raises: ValueError if it describes another kind of tokenizer, or an inconsistent one.
    """
    model = file.field("tokenizer.ggml.model", str)
    known = {"gpt2": _byte_level, "llama": _sentencepiece}
    require(model in known, WHERE, "the tokenizer", "byte-level BPE (gpt2) or SentencePiece (llama)", model)
    vocabulary = _texts(file, "tokenizer.ggml.tokens")
    roles = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{name}_token_id" in file.metadata:
            roles[role] = file.field(f"tokenizer.ggml.{name}_token_id", int)
    return known[model](file, vocabulary, _one_each(file, "token_type", len(vocabulary)), roles)


def _sentencepiece(file: GGUF, vocabulary: list[str], kinds: list[int], roles: dict[str, int]) -> SentencePieceBPE:
    special, unknown = (UNKNOWN, CONTROL), [text for text, kind in zip(vocabulary, kinds) if kind == UNKNOWN]
    added = [
        AddedToken(t, i, k in special) for i, (t, k) in enumerate(zip(vocabulary, kinds)) if k in (*special, ADDED)
    ]
    ids = {name: (roles[name],) for name in ("bos", "eos") if name in roles}
    opening = ids.get("bos") if file.field("tokenizer.ggml.add_bos_token", bool, True) else None
    closing = ids.get("eos") if file.field("tokenizer.ggml.add_eos_token", bool, False) else None
    first, second = ([(part, 0) for part in (opening, text, closing) if part is not None] for text in "AB")
    prefixed = file.field("tokenizer.ggml.add_space_prefix", bool, True)
    return SentencePieceBPE(
        vocabulary,
        scores=_one_each(file, "scores", len(vocabulary)),
        added=added,
        roles=roles,
        frame=Frame(tuple(first), tuple(first + second)),
        spaces=Spaces("each" if prefixed else "never", stripped=int(prefixed)),
        unknown=unknown[0] if unknown else None,
        fuse_unknown=False,
    )


def _byte_level(file: GGUF, vocabulary: list[str], kinds: list[int], roles: dict[str, int]) -> PretrainedBPE:
    rule = file.field("tokenizer.ggml.pre", str, "default")
    require(rule in SPLITS, WHERE, "the rule for cutting text", "one of " + ", ".join(SPLITS), rule)
    specials = {text: token for token, text in enumerate(vocabulary) if kinds[token] == CONTROL}
    return PretrainedBPE(
        vocabulary,
        [_pair(merge) for merge in _texts(file, "tokenizer.ggml.merges")],
        specials=specials,
        roles=roles,
        split=SPLITS[rule],
        adds_bos=file.field("tokenizer.ggml.add_bos_token", bool, False),
        whole_pieces=SPLITS[rule] == "llama3",
    )


def _one_each(file: GGUF, name: str, n: int) -> list:
    """One number for each token."""
    given = file.metadata.get(f"tokenizer.ggml.{name}")
    found = given.tolist() if isinstance(given, np.ndarray) else given
    numbers = isinstance(found, list) and len(found) == n and all(type(x) in (int, float) for x in found)
    require(numbers, WHERE, f"tokenizer.ggml.{name}", f"{n} numbers, one each", given)
    assert isinstance(found, list)
    return found


def _texts(file: GGUF, name: str) -> list[str]:
    texts = file.field(name, list)
    require(all(isinstance(text, str) for text in texts), WHERE, name, "texts", "something else")
    return texts


def _pair(merge: str) -> tuple[str, str]:
    first, space, second = merge.partition(" ")
    if not (first and space and second):
        raise ValueError(message(WHERE, "a merge", "two tokens with a space between", repr(merge)))
    return first, second
