"""Tokenizers of the `tokenizers` library, trained on a little text and set up as the files of known models are."""

import json
from functools import cache
from pathlib import Path
from pydoc_data import topics

import pytest

tokenizers = pytest.importorskip("tokenizers")
decoders, models, normalizers = tokenizers.decoders, tokenizers.models, tokenizers.normalizers
pre, processors, trainers = tokenizers.pre_tokenizers, tokenizers.processors, tokenizers.trainers

SPACE, UNKNOWN, BOS, EOS = "▁", "<unk>", "<s>", "</s>"
TEXT = "\n".join(topics.topics.values())[:60_000]
METASPACES = [f"{scheme}-{cut}" for scheme in ("first", "always", "never") for cut in ("split", "whole")]
KINDS = ["llama-2", "gemma", *METASPACES]  # "first-whole" is what Mistral and newer LLaMA folders have
PIECES = [
    "the", " ", "  ", "   ", "def ", "import", " is not", "\n", "\n\n", "\t", "x", "1984", "é", "e\u0301", "漢字", "👩‍👩‍👧", "\x00",
    "\ufffd", "▁", "<s>", "</s>", "<unk>", "<|turn|>", "<0x0A>", "wow", " wow", "<r>", ".", ", ", "'s", "don't", "\u00a0",
]  # fmt: skip


@cache
def trained(specials: tuple[str, ...], bytes_too: bool = True) -> dict:
    """A BPE model over the characters of the text, with tokens for bytes, as its JSON."""
    names = [*specials, *([f"<0x{byte:02X}>" for byte in range(256)] if bytes_too else [])]
    made = tokenizers.Tokenizer(models.BPE(unk_token=UNKNOWN))
    made.pre_tokenizer = pre.Metaspace(SPACE, prepend_scheme="always", split=True)
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=700, special_tokens=names, show_progress=False))
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    return state


def sentencepiece(
    kind: str = "llama-2",
    *,
    byte_fallback: bool = True,
    fuse_unk: bool = True,
    specials: tuple[str, ...] = (),
    added: bool = False,
):
    """BPE with "▁" for the space; ``added``: tokens of every flag that we read."""
    state = json.loads(json.dumps(trained((UNKNOWN, BOS, EOS, *specials), byte_fallback)))
    state["model"].update(byte_fallback=byte_fallback, fuse_unk=fuse_unk)
    made = tokenizers.Tokenizer.from_str(json.dumps(state))
    if kind == "llama-2":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        made.pre_tokenizer = None
    elif kind == "gemma":
        made.normalizer = normalizers.Replace(" ", SPACE)
        made.pre_tokenizer = pre.Split(" ", "merged_with_previous")
    else:
        scheme, cut = kind.split("-")
        made.pre_tokenizer = pre.Metaspace(SPACE, prepend_scheme=scheme, split=cut == "split")
    strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, 1)]
    )
    if added:
        token = tokenizers.AddedToken
        made.add_special_tokens(["<|turn|>"])
        made.add_tokens([token("\n\n", normalized=False), token("wow", normalized=True)])
        made.add_tokens([token("<r>", normalized=False, lstrip=True, rstrip=True)])
    return made


def bert(
    clean: bool = True,
    chinese: bool = True,
    accents: bool | None = None,
    lower: bool = True,
    *,
    longest: int = 100,
    cleanup: bool = True,
    added: bool = False,
):
    """WordPiece as BERT has it."""
    made = tokenizers.Tokenizer.from_str(_wordpieces(clean, chinese, accents, lower))
    state = json.loads(made.to_str())
    state["model"]["max_input_chars_per_word"] = longest
    made = tokenizers.Tokenizer.from_str(json.dumps(state))
    made.decoder = decoders.WordPiece("##", cleanup=cleanup)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    if added:
        made.add_tokens([tokenizers.AddedToken("WoW", normalized=True), tokenizers.AddedToken("<r>", normalized=False)])
    return made


@cache
def _wordpieces(clean: bool, chinese: bool, accents: bool | None, lower: bool) -> str:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(clean, chinese, accents, lower)
    made.pre_tokenizer = pre.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=350, special_tokens=names, show_progress=False)
    made.train_from_iterator([TEXT + " 漢 字 é ü ' . ! ? ,"], trainer)
    return made.to_str()


def written(tokenizer: "tokenizers.Tokenizer", folder: Path, **roles: str) -> Path:
    """The folder with the tokenizer's files; ``roles``: bos_token="<s>" and so on."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(roles), encoding="utf-8")
    return folder
