"""What holds for every tokenizer: exact round trips, reserved special tokens, files, refusals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, tokenizer_from_dict

SPECIALS = ("bos", "eos", "pad", "cls", "sep")
TEXT = "the cat that sat on the mat, the 12 cats' hats — naïve 😀😀 <eos> and   spaces\n\nand lines\n" * 3
TOKENIZERS = {
    "bytes": ByteTokenizer(SPECIALS),
    "bpe": BPETokenizer.train(TEXT, 330, specials=SPECIALS),
    "bpe-unsplit": BPETokenizer.train(TEXT, 330, specials=SPECIALS, split="none"),
    "bpe-words": BPETokenizer.train(TEXT, 330, specials=SPECIALS, split="words"),
    "sentencepiece-like": BPETokenizer.train(TEXT, 330, specials=SPECIALS, split="words", alphabet="characters"),
}
each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
anything = st.text() | st.text("the cat😀é\n <eos>") | st.sampled_from([TEXT, "", "😀", " ", "\x00"])


@each
@pytest.mark.equation("tokenizer-bpe")
@settings(max_examples=40)
@given(text=anything)
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text


@each
@pytest.mark.equation("tokenizer-bpe")
@settings(max_examples=40)
@given(data=st.binary() | st.builds(bytes.__add__, st.text().map(str.encode), st.binary(max_size=4)))
def test_any_bytes_survive_valid_utf8_or_not(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@each
@pytest.mark.equation("special-tokens")
@settings(max_examples=40)
@given(text=anything | st.sampled_from(["<eos>", "<bos><pad>", "eos", "<|eos|>"]))
def test_ordinary_text_never_reaches_a_special_id(tokenizer, text):
    reserved = [tokenizer.special_id(name) for name in SPECIALS]
    assert reserved == list(range(tokenizer.vocab_size - 5, tokenizer.vocab_size))
    assert not np.isin(tokenizer.encode(text), reserved).any()


@each
@pytest.mark.equation("special-tokens")
def test_special_tokens_frame_a_text_and_spell_nothing(tokenizer):
    plain = tokenizer.encode("a cat")
    framed = tokenizer.encode("a cat", bos=True, eos=True)
    assert framed[0] == tokenizer.bos_id and framed[-1] == tokenizer.eos_id
    np.testing.assert_array_equal(framed[1:-1], plain)
    padded = np.append(framed, tokenizer.pad_id)
    assert tokenizer.decode(padded) == "a cat"
    assert tokenizer.decode(padded, skip_special=False) == "<bos>a cat<eos><pad>"
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3


@each
@settings(max_examples=25)
@given(data=st.data())
def test_any_sequence_of_ids_decodes_to_printable_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    tokenizer.decode(ids).encode("utf-8")  # no lone surrogates
    ordinary = [i for i in ids if i < tokenizer.n_ordinary]
    assert tokenizer.decode_bytes(ids) == b"".join(tokenizer.decode_bytes([i]) for i in ordinary)


def test_an_emoji_cut_in_two_is_replaced_in_text_and_exact_in_bytes():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a😀")
    assert len(ids) == 5
    assert tokenizer.decode(ids[:3]) == "a\ufffd"
    assert tokenizer.decode(ids[:3], errors="ignore") == "a"
    assert tokenizer.decode_bytes(ids[:3]) + tokenizer.decode_bytes(ids[3:]) == "a😀".encode()
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(ids[:3], errors="strict")


@each
def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    for loader in (Tokenizer, type(tokenizer)):
        again = loader.load(tmp_path / "t.json")
        assert again == tokenizer and type(again) is type(tokenizer)
        np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


def test_different_tokenizers_are_not_equal():
    assert ByteTokenizer() != ByteTokenizer(("eos",))
    assert TOKENIZERS["bpe"] != TOKENIZERS["bpe-words"]


@each
@pytest.mark.parametrize("wrong", [-1, 10_000])
def test_ids_out_of_range_are_refused_with_their_place(tokenizer, wrong):
    with pytest.raises(
        IndexError, match=rf"every id must be in \[0, {tokenizer.vocab_size}\), got {wrong} at position 1"
    ):
        tokenizer.decode([3, wrong])


@each
def test_what_is_no_sequence_of_ids_is_refused(tokenizer):
    with pytest.raises(TypeError, match="integers"):
        tokenizer.decode(np.array([0.5]))
    with pytest.raises(ValueError, match="one sequence"):
        tokenizer.decode(np.zeros((2, 2), np.int64))


@each
def test_what_is_no_text_is_refused(tokenizer):
    with pytest.raises(TypeError, match="str or bytes, got 3"):
        tokenizer.encode(3)
    with pytest.raises(ValueError, match="lone surrogate at position 1"):
        tokenizer.encode("a\ud800")


def test_asking_for_a_special_token_that_is_not_reserved_says_how_to_reserve_it():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 256 and tokenizer.eos_id is None
    with pytest.raises(ValueError, match=r'specials=\("eos", \.\.\.\)'):
        tokenizer.encode("a", eos=True)


@pytest.mark.parametrize("specials", [("eos", "eos"), ("",)])
def test_special_tokens_need_distinct_names(specials):
    with pytest.raises(ValueError, match="special token"):
        ByteTokenizer(specials)


@settings(max_examples=25)
@given(text=st.text("01+="))
def test_characters_are_their_places_in_the_alphabet(text):
    tokenizer = CharTokenizer("01+=", ("eos",))
    assert tokenizer.encode(text).tolist() == ["01+=".index(c) for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 5 and tokenizer.eos_id == 4


def test_a_character_outside_the_alphabet_is_refused():
    with pytest.raises(ValueError, match=r"one of '01', got '7' at position 1"):
        CharTokenizer("01").encode("07")
    for alphabet in ("", "aa"):
        with pytest.raises(ValueError, match="the alphabet"):
            CharTokenizer(alphabet)


GOOD = TOKENIZERS["bpe"].to_dict()


@pytest.mark.parametrize(
    "state",
    [
        [],
        {},
        {**GOOD, "format": "other"},
        {**GOOD, "version": 2},
        {**GOOD, "kind": "unknown"},
        {**GOOD, "split": "unknown"},
        {**GOOD, "merges": "text"},
        {**GOOD, "merges": [[97, 900]]},
        {**GOOD, "merges": [[97, -1]]},
        {**GOOD, "merges": [[97, 98], [97, 98]]},
        {**GOOD, "merges": [[97, 98, 99]]},
        {**GOOD, "merges": [[97, 98.0]]},
        {**GOOD, "characters": "a"},
        {**GOOD, "characters": "éé"},
        {**GOOD, "specials": [3]},
        {name: value for name, value in GOOD.items() if name != "merges"},
    ],
)
def test_corrupt_files_are_refused_with_their_name(tmp_path, state):
    (tmp_path / "t.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"t\.json is not a usable tokenizer"):
        Tokenizer.load(tmp_path / "t.json")


def test_truncated_missing_and_foreign_files_are_refused(tmp_path):
    TOKENIZERS["bpe"].save(tmp_path / "t.json")
    whole = (tmp_path / "t.json").read_bytes()
    (tmp_path / "t.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"t\.json must be complete JSON"):
        Tokenizer.load(tmp_path / "t.json")
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "missing.json")
    ByteTokenizer().save(tmp_path / "bytes.json")
    with pytest.raises(ValueError, match="must be a BPETokenizer"):
        BPETokenizer.load(tmp_path / "bytes.json")
