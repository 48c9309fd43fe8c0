r"""BPE with "▁" for the space in the words of `tokenizer.json`."""

from pathlib import Path
from typing import Any

from minillm.checks import message, require
from minillm.data.sentencepiece_bpe import SPACE, SentencePieceBPE, Spaces
from minillm.data.tokenizer_parts import WHERE, in_order, read_added, read_frame, read_roles, write_added, write_frame

PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
UNDERSTOOD = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
UNDERSTOOD += [{"type": "ByteFallback"}, {"type": "Fuse"}]
NO_CUT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def read_sentencepiece(state: dict[str, Any], path: Path) -> SentencePieceBPE:
    """The tokenizer that the contents of a file describe.

    Raises: ValueError for steps that are not those of Llama 2, TinyLlama, Mistral and Gemma; KeyError and TypeError for
        contents without the parts of a tokenizer.
    """
    model = state["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        require(not model.get(name), WHERE, f"{name} in {path}", "none", str(model.get(name)))
    flags = {name: model.get(name) or False for name in ("fuse_unk", "byte_fallback", "ignore_merges")}
    require(all(type(f) is bool for f in flags.values()), WHERE, f"the flags in {path}", "true or false", str(flags))
    spaces = read_spaces(state, path)
    added = read_added(state, path)
    ids = {token.content: token.id for token in added}
    vocabulary = in_order({**model["vocab"], **ids}, path)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    for i, merge in enumerate(merges):
        require(len(merge) == 2, WHERE, f"merge {i} in {path}", "of two tokens", str(merge))
    return SentencePieceBPE(
        vocabulary,
        merges,
        added=added,
        roles=read_roles(path.parent, ids),
        frame=read_frame(state.get("post_processor"), path, len(vocabulary)),
        spaces=spaces,
        unknown=model.get("unk_token"),
        fuse_unknown=flags["fuse_unk"],
        byte_fallback=flags["byte_fallback"],
        whole_pieces=flags["ignore_merges"],
    )


def read_spaces(state: dict[str, Any], path: Path) -> Spaces:
    """What becomes of spaces, from the normaliser, the pre-tokenizer and the decoder."""
    normaliser = _steps(state.get("normalizer"), "normalizers")
    cut = _steps(state.get("pre_tokenizer"), "pretokenizers")
    stripped = _stripped(_steps(state.get("decoder"), "decoders"), path)
    if normaliser:
        known = [step for step in normaliser if step in (PREPEND, REPLACE)]
        sound = known == normaliser and REPLACE in known and known.count(PREPEND) < 2
        wanted = 'none, or Replace " " by "▁" with or without Prepend "▁"'
        require(sound, WHERE, f"the normaliser in {path}", wanted, str(normaliser)[:120])
        require(cut in ([], [NO_CUT]), WHERE, f"the cut in {path}", "none beside a normaliser", str(cut)[:80])
        return Spaces("each" if PREPEND in known else "never", True, False, stripped)
    space = cut[0] if len(cut) == 1 else {}
    sound = space.get("type") == "Metaspace" and space.get("replacement") == SPACE
    wanted = 'Metaspace with "▁", or byte-level with one of the rules that we have'
    require(sound, WHERE, f"the cut in {path}", wanted, str(cut)[:80])
    prefix, words = space.get("prepend_scheme", "always"), space.get("split")
    agrees = prefix in ("always", "first", "never") and (
        space.get("add_prefix_space") is not False or prefix == "never"
    )
    require(agrees, WHERE, f"prepend_scheme in {path}", "always, first or never", str(space)[:120])
    require(words in (None, True, False), WHERE, f"split in {path}", "true or false", str(words))
    return Spaces(prefix, False, words is not False, stripped)


def _steps(step: Any, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    steps = step[name] if step["type"] == "Sequence" else [step]
    return [{"invert": False, **inner} if inner["type"] == "Split" else dict(inner) for inner in steps]


def _stripped(steps: list[dict[str, Any]], path: Path) -> int:
    """How many spaces decoding takes away at the beginning."""
    known, rest = steps[: len(UNDERSTOOD)], steps[len(UNDERSTOOD) :]
    start: Any = rest[0].get("start") if rest else 0
    strip = {"type": "Strip", "content": " ", "start": start, "stop": 0}
    if known != UNDERSTOOD or rest not in ([], [strip]) or type(start) is not int or start < 0:
        wanted = 'Replace "▁" by " ", ByteFallback, Fuse and perhaps Strip of spaces at the beginning'
        raise ValueError(message(WHERE, f"the decoder in {path}", wanted, str(steps)[:120]))
    return start


def sentencepiece_json(tokenizer: SentencePieceBPE) -> dict[str, Any]:
    """The contents of a file that describes the tokenizer.

    Raises: ValueError for one with scores, which the format has no place for.
    """
    hint = "Such tokenizers come from GGUF files."
    require(tokenizer.merges is not None, "write_tokenizer_json", "the tokenizer", "one with merges", "scores", hint)
    spaces = tokenizer.spaces
    early = [*([PREPEND] if spaces.prefix == "each" else []), REPLACE]
    late = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": spaces.prefix, "split": spaces.words}
    strip = [{"type": "Strip", "content": " ", "start": spaces.stripped, "stop": 0}] if spaces.stripped else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": write_added(tokenizer.added.tokens),
        "normalizer": {"type": "Sequence", "normalizers": early} if spaces.early else None,
        "pre_tokenizer": None if spaces.early else late,
        "post_processor": write_frame(tokenizer.frame, tokenizer.vocabulary),
        "decoder": {"type": "Sequence", "decoders": [*UNDERSTOOD, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": tokenizer.fuse_unknown,
            "byte_fallback": tokenizer.byte_fallback,
            "ignore_merges": tokenizer.whole_pieces,
            "vocab": {text: token for token, text in enumerate(tokenizer.vocabulary)},
            "merges": [list(pair) for pair in tokenizer.merges or []],
        },
    }
