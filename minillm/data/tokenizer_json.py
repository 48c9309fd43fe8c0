r"""The file `tokenizer.json` that pretrained models come with, read and written."""

import json
import os
from pathlib import Path
from typing import Any

from minillm.checks import message, require
from minillm.data.files import read_json, write_json
from minillm.data.frames import Frame
from minillm.data.pretrained_bpe import PretrainedBPE
from minillm.data.sentencepiece_bpe import SentencePieceBPE
from minillm.data.sentencepiece_json import read_sentencepiece, sentencepiece_json
from minillm.data.tokenizer_parts import WHERE, in_order, read_frame, read_roles, write_frame, write_roles
from minillm.data.wordpiece import WordPiece
from minillm.data.wordpiece_json import read_wordpiece, wordpiece_json

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}


def _regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


CUTS: dict[str, list[dict[str, Any]]] = {  # our rules as the steps of their `pre_tokenizer`
    "gpt2": [{**_BYTES, "use_regex": True}],
    "smollm": [_DIGITS, {**_BYTES, "use_regex": True}],
    "llama3": [_regex(LLAMA3), {**_BYTES, "use_regex": False}],
    "qwen2": [_regex(LLAMA3.replace("{1,3}", "")), {**_BYTES, "use_regex": False}],
}


def read_tokenizer_json(folder: str | os.PathLike) -> PretrainedBPE | SentencePieceBPE | WordPiece:
    """The tokenizer of a folder with `tokenizer.json` and, for the roles of special tokens, `tokenizer_config.json`.

    Byte-level BPE, BPE with "▁" for the space, or WordPiece.

    Raises: FileNotFoundError if there is no file; ValueError if it is another kind, or one with steps that we do not have.
    """
    path = Path(folder) / "tokenizer.json"
    state = read_json(path, WHERE)
    try:
        model = state["model"]
        kind = model.get("type", "BPE" if "merges" in model else "another kind")
        known = kind in ("BPE", "WordPiece")
        require(known, WHERE, f"the model in {path}", "BPE or WordPiece", str(kind)[:80])
        if kind == "WordPiece":
            return read_wordpiece(state, path)
        byte_level = "ByteLevel" in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])
        return _read_byte_level(state, path) if byte_level else read_sentencepiece(state, path)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(message(WHERE, str(path), "the description of a tokenizer", f"no such ({error!r})")) from error


def _read_byte_level(state: dict[str, Any], path: Path) -> PretrainedBPE:
    model, steps = state["model"], state.get("pre_tokenizer") or {}
    require(not model.get("byte_fallback"), WHERE, str(path), "byte-level BPE", "one with bytes to fall back to, too")
    require(not state.get("normalizer"), WHERE, f"the normaliser in {path}", "none", str(state.get("normalizer")))
    rule = _rule(steps.get("pretokenizers", [steps]), path)
    added = {token["content"]: token["id"] for token in state.get("added_tokens") or []}
    vocabulary = in_order({**model["vocab"], **added}, path)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    for i, merge in enumerate(merges):
        require(len(merge) == 2, WHERE, f"merge {i} in {path}", "of two tokens", str(merge))
    opening = read_frame(state.get("post_processor"), path, len(vocabulary)).opening
    roles = read_roles(path.parent, added)
    return PretrainedBPE(
        vocabulary,
        merges,
        specials=added,
        roles={"bos": opening[0], **roles} if opening else roles,
        split=rule,
        adds_bos=bool(opening),
        whole_pieces=bool(model.get("ignore_merges")),
    )


def write_tokenizer_json(tokenizer: PretrainedBPE | SentencePieceBPE | WordPiece, folder: str | os.PathLike) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` so that transformers reads the tokenizer.

    Raises: ValueError for a tokenizer that is none of a pretrained model, or one that merges by scores.
    """
    kinds = (PretrainedBPE, SentencePieceBPE, WordPiece)
    wanted, received = "one of a pretrained model", f"a {type(tokenizer).__name__}"
    require(isinstance(tokenizer, kinds), "write_tokenizer_json", "the tokenizer", wanted, received)
    if isinstance(tokenizer, PretrainedBPE):
        state = _byte_level_json(tokenizer)
    elif isinstance(tokenizer, WordPiece):
        state = wordpiece_json(tokenizer)
    else:
        state = sentencepiece_json(tokenizer)
    folder = Path(folder)
    write_json(folder / "tokenizer.json", state)
    roles: dict[str, Any] = dict(
        write_roles(tokenizer.roles, {token: name for name, token in tokenizer.special_ids.items()})
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    if isinstance(tokenizer, WordPiece):
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", config)


def _byte_level_json(tokenizer: PretrainedBPE) -> dict[str, Any]:
    names = {token: name for name, token in tokenizer.special_ids.items()}
    bos = [((tokenizer.bos_id,), 0)] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    frame = Frame((*bos, ("A", 0)), (*bos, ("A", 0), ("B", 1)))
    shown = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "ignore_merges": tokenizer.whole_pieces,
        "vocab": {text: token for token, text in enumerate(tokenizer.vocabulary)},
        "merges": [list(pair) for pair in tokenizer.merges],
    }
    return {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": names[token], **shown} for token in sorted(names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[tokenizer.split]},
        "post_processor": write_frame(frame, tokenizer.vocabulary),
        "decoder": {**_BYTES, "use_regex": True},
        "model": model,
    }


def _rule(steps: list[dict[str, Any]], path: Path) -> str:
    """Which of our rules the steps are; only what changes the cut is looked at."""

    def essence(step: dict[str, Any]) -> tuple:
        kind = step.get("type")
        if kind == "ByteLevel":
            return kind, step.get("use_regex", True), step.get("add_prefix_space", True)
        return kind, step.get("individual_digits"), json.dumps(step.get("pattern"))

    for name, ours in CUTS.items():
        if [essence(step) for step in ours] == [essence(step) for step in steps]:
            return name
    raise ValueError(message(WHERE, f"the cut in {path}", "one of " + ", ".join(CUTS), str(steps)[:80]))
