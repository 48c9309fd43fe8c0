r"""The file `tokenizer.json` that pretrained models come with, read and written where it is byte-level BPE."""

import json
import os
from pathlib import Path
from typing import Any

from minillm.checks import message, require
from minillm.data.files import read_json, write_json
from minillm.data.pretrained_bpe import PretrainedBPE

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
ROLES = {"bos": "bos_token", "eos": "eos_token", "pad": "pad_token"}


def read_tokenizer_json(folder: str | os.PathLike) -> PretrainedBPE:
    """The tokenizer of a folder with `tokenizer.json` and, for the roles of special tokens, `tokenizer_config.json`.

    Raises: FileNotFoundError if there is no file; ValueError if it is not byte-level BPE with a rule that we have.
    """
    where, path = "read_tokenizer_json", Path(folder) / "tokenizer.json"
    state = read_json(path, where)
    try:
        model, steps = state["model"], state.get("pre_tokenizer") or {}
        kind = model.get("type", "BPE" if "merges" in model else "another kind")
        require(kind == "BPE" and not model.get("byte_fallback"), where, str(path), "byte-level BPE", kind)
        require(not state.get("normalizer"), where, f"the normaliser in {path}", "none", str(state.get("normalizer")))
        rule = _rule(steps.get("pretokenizers", [steps]), path)
        added = {token["content"]: token["id"] for token in state.get("added_tokens", [])}
        vocabulary = _in_order({**model["vocab"], **added}, path)
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(message(where, str(path), "the description of a tokenizer", f"no such ({error!r})")) from error
    return PretrainedBPE(
        vocabulary,
        merges,
        specials=added,
        roles=_roles(Path(folder) / "tokenizer_config.json", added),
        split=rule,
        adds_bos="TemplateProcessing" in json.dumps(state.get("post_processor")),
        whole_pieces=bool(model.get("ignore_merges")),
    )


def write_tokenizer_json(tokenizer: PretrainedBPE, folder: str | os.PathLike) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` so that transformers reads the tokenizer."""
    folder = Path(folder)
    names = {token: name for name, token in tokenizer.special_ids.items()}
    shown = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "ignore_merges": tokenizer.whole_pieces,
        "vocab": {text: token for token, text in enumerate(tokenizer.vocabulary)},
        "merges": [list(pair) for pair in tokenizer.merges],
    }
    state = {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": names[token], **shown} for token in sorted(names)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[tokenizer.split]},
        "post_processor": None,
        "decoder": {**_BYTES, "use_regex": True},
        "model": model,
    }
    write_json(folder / "tokenizer.json", state)
    roles = {ROLES[role]: names[token] for role, token in tokenizer.roles.items() if token in names and role in ROLES}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles})


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
    raise ValueError(message("read_tokenizer_json", f"the cut in {path}", "one of " + ", ".join(CUTS), str(steps)[:80]))


def _in_order(ids: dict[str, int], path: Path) -> list[str]:
    texts = {token: text for text, token in ids.items()}
    whole = len(texts) == len(ids) and set(texts) == set(range(len(texts)))
    require(whole, "read_tokenizer_json", f"the ids in {path}", "0, 1, 2 ... without gaps or repeats", "others")
    return [texts[token] for token in range(len(texts))]


def _roles(path: Path, added: dict[str, int]) -> dict[str, int]:
    if not path.is_file():
        return {}
    config = read_json(path, "read_tokenizer_json")
    roles = {}
    for role, key in ROLES.items():
        given = config.get(key) if isinstance(config, dict) else None
        text = given.get("content") if isinstance(given, dict) else given
        if text in added:
            roles[role] = added[text]
    return roles
