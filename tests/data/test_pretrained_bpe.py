"""Pretrained tokenizers against the library that they were made with."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import tokenizer_from_dict
from minillm.data.pretokenize import RULES, split_text
from minillm.data.pretrained_bpe import PretrainedBPE, byte_alphabet

tokenizers = pytest.importorskip("tokenizers")
pre = tokenizers.pre_tokenizers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def isolated(rule: str):
    return pre.Split(tokenizers.Regex(rule), behavior="isolated")


GPT2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
THEIRS = {
    "gpt2": GPT2,
    "smollm": pre.Sequence([pre.Digits(individual_digits=True), GPT2]),
    "llama3": isolated(LLAMA3),
    "qwen2": isolated(LLAMA3.replace("{1,3}", "")),
}
TEXTS = [
    "It's 1984's   last  day, isn't it?\n\n  He'LL say: 2,048 times!  ",
    "x_1 = {'a': [1.5e-3, None]}\r\n\tif x:\n\t\treturn  # ½ of ²³ Ⅷ\n",
    "naïve café — 東京の一番、二〇二四年 ١٢٣ emoji 👩‍👩‍👧 Ελλάδα\u3000\u00a0end\x85\x1c\x1f",
    "",
    " ",
    "\n",
]


def their_pieces(rule: str, text: str) -> list[str]:
    return [text[start:stop] for _, (start, stop) in THEIRS[rule].pre_tokenize_str(text)]


@pytest.mark.equation("tokenizer-bpe")
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(st.characters(max_codepoint=0x17F), max_size=30)))
def test_the_cut_is_theirs(rule, text):
    pieces = split_text(text, rule)
    assert "".join(pieces) == text
    assert pieces == their_pieces(rule, text)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_assigned_character_is_cut_as_theirs(rule):
    """Characters that this Python's Unicode tables do not have yet are left out."""
    characters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    wrong = []
    for start in range(0, len(characters), 64):
        text = "".join(f"a{c}{c}1 {c}!\n" for c in characters[start : start + 64])
        if split_text(text, rule) != their_pieces(rule, text):
            wrong += [
                c
                for c in characters[start : start + 64]
                if split_text(f"a{c}{c}1 {c}!", rule) != their_pieces(rule, f"a{c}{c}1 {c}!")
            ]
    assert [hex(ord(c)) for c in wrong] == []


def small_vocabulary() -> tuple[list[str], list[list[str]], dict[str, int]]:
    """Special tokens first and in the middle, ids in no order, and three bytes without an id."""
    merges = [
        ["t", "h"],
        ["th", "e"],
        ["Ġ", "the"],
        ["i", "n"],
        ["Ġ", "Ġ"],
        ["ĠĠ", "Ġ"],
        ["Ã", "©"],
        ["1", "2"],
        ["l", "l"],
    ]
    texts = [c for byte, c in enumerate(byte_alphabet()) if byte not in (0, 4, 255)] + ["".join(m) for m in merges]
    order = np.random.default_rng(0).permutation(len(texts))
    texts = ["<|end|>", *(texts[i] for i in order[:100]), "<|turn|>", *(texts[i] for i in order[100:])]
    return texts, merges, {"<|end|>": 0, "<|turn|>": 101}


def pair(rule: str = "smollm"):
    vocabulary, merges, specials = small_vocabulary()
    ours = PretrainedBPE(vocabulary, merges, specials=specials, roles={"eos": 0}, split=rule)
    model = tokenizers.models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[tuple(m) for m in merges])
    theirs = tokenizers.Tokenizer(model)
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre.Sequence([THEIRS[rule], byte_level]) if rule in ("llama3", "qwen2") else THEIRS[rule]
    return ours, theirs


@pytest.mark.equation("tokenizer-bpe", "special-tokens")
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text("thein l'1 2é\n\x00\x04😀", max_size=20)))
def test_ids_are_theirs_and_decode_to_the_text(rule, text):
    ours, theirs = pair(rule)
    ids = ours.encode(text)
    assert ids.tolist() == theirs.encode(text).ids
    assert ours.decode(ids) == text.replace("\x00", "").replace("\x04", "")  # bytes without an id


@pytest.mark.equation("special-tokens")
def test_special_tokens_have_roles_and_texts_and_are_not_spelled():
    ours, _ = pair()
    assert (ours.eos_id, ours.bos_id, ours.special_id("<|turn|>"), ours.vocab_size) == (
        0,
        None,
        101,
        len(ours.vocabulary),
    )
    assert 101 not in ours.encode("<|turn|>") and ours.decode(ours.encode("<|turn|>")) == "<|turn|>"
    framed = ours.encode("the", eos=True)
    assert framed[-1] == 0 and ours.decode(framed) == "the"
    assert ours.decode([101, *ours.encode("in"), 0], skip_special=False) == "<|turn|>in<|end|>"
    with pytest.raises(ValueError, match="bos"):
        ours.encode("the", bos=True)
    with pytest.raises(IndexError, match="every id"):
        ours.decode([ours.vocab_size])


def test_a_piece_of_the_vocabulary_is_one_token_where_the_model_says_so():
    vocabulary, merges, specials = small_vocabulary()
    vocabulary = [*vocabulary, "zzz"]  # no merge makes it
    merged, whole = (
        PretrainedBPE(vocabulary, merges, specials=specials, split="llama3", whole_pieces=flag)
        for flag in (False, True)
    )
    assert len(merged.encode("zzz")) == 3 and whole.encode("zzz").tolist() == [len(vocabulary) - 1]


def test_it_survives_being_saved(tmp_path):
    ours, _ = pair()
    ours.save(tmp_path / "tokenizer.json")
    again = PretrainedBPE.load(tmp_path / "tokenizer.json")
    assert again == ours and tokenizer_from_dict(ours.to_dict()) == ours
    assert again.encode(TEXTS[0]).tolist() == ours.encode(TEXTS[0]).tolist() and again.eos_id == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "words"}, "split must be one of gpt2, smollm"),
        ({"merges": [["t", "q"]]}, "merge 0 must be of two tokens of the vocabulary into a third"),
        ({"vocabulary": ["日"]}, "token 0 must be spelled in the alphabet"),
        ({"specials": {"<x>": 10**6}}, "the id of <x> must be in"),
        ({"roles": {"eos": -1}}, "the id of eos must be in"),
    ],
)
def test_inconsistent_vocabularies_are_refused(change, words):
    vocabulary, merges, specials = small_vocabulary()
    settings = {"vocabulary": vocabulary, "merges": merges, "specials": specials, **change}
    if "vocabulary" in change:
        settings |= {"specials": {}, "merges": []}
    with pytest.raises(ValueError, match=words):
        PretrainedBPE(settings.pop("vocabulary"), settings.pop("merges"), **settings)
