r"""WordPiece in the words of `tokenizer.json`."""

from pathlib import Path
from typing import Any

from minillm.checks import require
from minillm.data.bert_text import BertText
from minillm.data.tokenizer_parts import WHERE, in_order, read_added, read_frame, read_roles, write_added, write_frame
from minillm.data.wordpiece import WordPiece

STEPS = {"clean": "clean_text", "chinese": "handle_chinese_chars", "accents": "strip_accents", "lower": "lowercase"}


def read_wordpiece(state: dict[str, Any], path: Path) -> WordPiece:
    """The tokenizer that the contents of a file describe.

    Raises: ValueError for another normaliser, pre-tokenizer or decoder than BERT's; KeyError and TypeError for contents
        without the parts of a tokenizer.
    """
    model = state["model"]
    parts = {"normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer", "decoder": "WordPiece"}
    for part, wanted in parts.items():
        received = (state.get(part) or {}).get("type", "none")
        require(received == wanted, WHERE, f"the {part} in {path}", wanted, str(received)[:80])
    given = {name: state["normalizer"][key] for name, key in STEPS.items()}
    sound = all(type(flag) is bool or (name == "accents" and flag is None) for name, flag in given.items())
    require(sound, WHERE, f"the normalizer in {path}", "steps that are true or false (strip_accents: or null)", given)
    prefix, cleanup = model.get("continuing_subword_prefix", "##"), state["decoder"].get("cleanup", True)
    same = isinstance(prefix, str) and state["decoder"].get("prefix", "##") == prefix
    require(same, WHERE, f"the prefix in {path}", "one text in model and decoder", f"{prefix!r} and another"[:80])
    require(type(cleanup) is bool, WHERE, f"cleanup in {path}", "true or false", cleanup)
    added = read_added(state, path)
    ids = {token.content: token.id for token in added}
    vocabulary = in_order({**model["vocab"], **ids}, path)
    return WordPiece(
        vocabulary,
        added=added,
        roles=read_roles(path.parent, ids),
        frame=read_frame(state.get("post_processor"), path, len(vocabulary)),
        text=BertText(**given),
        unknown=model.get("unk_token", "[UNK]"),
        prefix=prefix,
        longest=model.get("max_input_chars_per_word", 100),
        cleanup=cleanup,
    )


def wordpiece_json(tokenizer: WordPiece) -> dict[str, Any]:
    """The contents of a file that describes the tokenizer."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": write_added(tokenizer.added.tokens),
        "normalizer": {"type": "BertNormalizer", **{STEPS[k]: v for k, v in tokenizer.text._asdict().items()}},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": write_frame(tokenizer.frame, tokenizer.vocabulary),
        "decoder": {"type": "WordPiece", "prefix": tokenizer.prefix, "cleanup": tokenizer.cleanup},
        "model": {
            "type": "WordPiece",
            "unk_token": tokenizer.unknown,
            "continuing_subword_prefix": tokenizer.prefix,
            "max_input_chars_per_word": tokenizer.longest,
            "vocab": {text: token for token, text in enumerate(tokenizer.vocabulary)},
        },
    }
