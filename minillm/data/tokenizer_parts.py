r"""The parts of `tokenizer.json` that all kinds of tokenizers share: vocabulary, added tokens, roles, frame."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.checks import message, require
from minillm.data.added_tokens import AddedToken
from minillm.data.files import read_json
from minillm.data.frames import Frame

WHERE = "read_tokenizer_json"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
ROLES = {role: f"{role}_token" for role in ("bos", "eos", "pad", "unk", "cls", "sep", "mask")}


def read_added(state: Mapping[str, Any], path: Path) -> list[AddedToken]:
    """The added tokens in the order of the file.

    Raises: ValueError for one that is a whole word only, or that is no token at all.
    """
    found = []
    for token in state.get("added_tokens") or []:
        sound = isinstance(token["content"], str) and type(token["id"]) is int
        require(sound, WHERE, f"an added token in {path}", "a text with an id", token)
        flags = {name: token.get(name, False) for name in FLAGS}
        flags["normalized"] = token.get("normalized", not flags["special"])
        wanted = "with flags true and false, and not for whole words only (single_word)"
        plain = all(type(flag) is bool for flag in flags.values()) and not flags.pop("single_word")
        require(plain, WHERE, f"an added token in {path}", wanted, token)
        found.append(AddedToken(token["content"], token["id"], **flags))
    return found


def write_added(tokens: Sequence[AddedToken]) -> list[dict[str, Any]]:
    """The way back."""
    rows = sorted(tokens, key=lambda token: token.id)
    return [{"id": t.id, **t._asdict(), "single_word": False} for t in rows]


def in_order(ids: Mapping[str, int], path: Path) -> list[str]:
    """Texts in the order of their ids."""
    texts = {token: text for text, token in ids.items() if type(token) is int}
    whole = len(texts) == len(ids) and set(texts) == set(range(len(texts)))
    require(whole, WHERE, f"the ids in {path}", "0, 1, 2 ... without gaps or repeats", "others")
    return [texts[token] for token in range(len(texts))]


def read_roles(folder: Path, added: Mapping[str, int]) -> dict[str, int]:
    """Which special tokens begin, end, fill ...; from `tokenizer_config.json`, or the older `special_tokens_map.json`."""
    roles: dict[str, int] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = read_json(folder / name, WHERE) if (folder / name).is_file() else None
        for role, key in ROLES.items():
            given = config.get(key) if isinstance(config, dict) else None
            text = given.get("content") if isinstance(given, dict) else given
            if isinstance(text, str) and text in added:
                roles[role] = added[text]
    return roles


def write_roles(roles: Mapping[str, int], names: Mapping[int, str]) -> dict[str, str]:
    """The entries of `tokenizer_config.json`."""
    return {ROLES[role]: names[token] for role, token in roles.items() if token in names and role in ROLES}


def read_frame(step: Any, path: Path, vocab_size: int) -> Frame:
    """The frame that a `post_processor` describes; those that only move offsets describe none.

    Raises: ValueError for another kind of post-processor.
    """
    if step is None or step["type"] == "ByteLevel":
        return Frame()
    kind = step["type"]
    if kind == "Sequence":
        frames = [read_frame(inner, path, vocab_size) for inner in step["processors"]]
        telling = [frame for frame in frames if frame != Frame()]
        require(len(telling) <= 1, WHERE, f"the post_processor in {path}", "one frame", f"{len(telling)}")
        return telling[0] if telling else Frame()
    if kind in ("BertProcessing", "RobertaProcessing"):
        cls, sep = [step["cls"][1]], [step["sep"][1]]
        single = [[cls, 0], ["A", 0], [sep, 0]]
        second = [["B", 1], [sep, 1]] if kind == "BertProcessing" else [[sep, 0], ["B", 0], [sep, 0]]
        return Frame.from_lists([single, single + second], vocab_size)
    if kind != "TemplateProcessing":
        wanted = "TemplateProcessing, that of BERT or RoBERTa, or none"
        raise ValueError(message(WHERE, f"the post_processor in {path}", wanted, str(kind)[:80]))
    specials = step.get("special_tokens") or {}
    sides = []
    for side in (step["single"], step["pair"]):
        slots = []
        for item in side:
            ((what, given),) = item.items()
            text = given["id"]
            ids = text if what == "Sequence" else list(specials[text]["ids"])
            slots.append([ids, given["type_id"]])
        sides.append(slots)
    return Frame.from_lists(sides, vocab_size)


def write_frame(frame: Frame, vocabulary: Sequence[str]) -> dict[str, Any] | None:
    """The `post_processor` for a frame."""
    if frame == Frame():
        return None
    specials: dict[str, Any] = {}
    sides = []
    for slots in frame:
        side = []
        for what, segment in slots:
            if isinstance(what, str):
                side.append({"Sequence": {"id": what, "type_id": segment}})
                continue
            tokens = [vocabulary[i] for i in what]
            name = " ".join(tokens)
            specials[name] = {"id": name, "ids": list(what), "tokens": tokens}
            side.append({"SpecialToken": {"id": name, "type_id": segment}})
        sides.append(side)
    return {"type": "TemplateProcessing", "single": sides[0], "pair": sides[1], "special_tokens": specials}
