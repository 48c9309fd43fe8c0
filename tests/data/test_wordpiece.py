"""WordPiece against the library: cleaning, cutting, pieces, frames, decoding."""

import json
import unicodedata
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm.data.bert_text import BertText, words
from minillm.data.frames import Frame
from minillm.data.tokenizer_json import read_tokenizer_json, write_tokenizer_json
from minillm.data.wordpiece import WordPiece
from tests.oracles.tokenizer_files import PIECES, bert, written

tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.equation("special-tokens")

ROLES = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": {"content": "[MASK]"}}
SPELLED = [
    *PIECES,
    "[MASK]",
    "[CLS] ",
    "WoW",
    "wOw",
    "ÉÀ",
    "Σς",
    "İ",
    "The",
    ",",
    "!?",
    " ' ",
    " do not",
    "n't",
    "\x07",
    "\ue000",
]
texts = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(SPELLED), max_size=7).map("".join))
KINDS = {
    "uncased": {},
    "cased": {"accents": False, "lower": False, "cleanup": False},
    "as it is": {"clean": False, "chinese": False, "accents": True, "lower": False, "longest": 4},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    theirs = bert(**KINDS[request.param], added=True)
    return read_tokenizer_json(written(theirs, tmp_path_factory.mktemp("files"), **ROLES)), theirs


def known(text: str) -> bool:
    """Whether this Python's Unicode tables have the characters, so that their lower case and parts are the same."""
    return all(unicodedata.category(character) != "Cn" for character in text)


@settings(max_examples=80)
@given(text=texts.filter(known))
@example(text="")
@example(text="a [MASK] wow  WoW<r>x\u2e52y")
def test_ids_and_decoded_text_are_theirs(pair, text):
    ours, theirs = pair
    for marks in (False, True):
        ids = (ours.encode_marked(text) if marks else ours.encode(text)).tolist()
        theirs.encode_special_tokens = not marks
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        theirs.encode_special_tokens = False
        for skip in (False, True):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode_bytes(ids).decode("utf-8") == ours.decode(ids)


@settings(max_examples=60)
@given(
    text=texts.filter(known),
    steps=st.sampled_from([*product((True, False), (True, False), (None, True, False), (True, False))]),
)
def test_cleaning_and_cutting_are_theirs(text, steps):
    ours = BertText(*steps).normalise(text)
    assert ours == tokenizers.normalizers.BertNormalizer(*steps).normalize_str(text)
    assert words(text) == [piece for piece, _ in tokenizers.pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text)]


@pytest.mark.slow
def test_every_character_is_treated_as_theirs():
    """Of every character that this Python knows: what becomes of it, and whether it cuts words."""
    everything = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    theirs, cut = tokenizers.normalizers.BertNormalizer(), tokenizers.pre_tokenizers.BertPreTokenizer()

    def same(characters: list[str]) -> bool:
        text = "".join(f"a{character}a " for character in characters)
        cleaned = BertText().normalise(text) == theirs.normalize_str(text)
        return cleaned and words(text) == [piece for piece, _ in cut.pre_tokenize_str(text)]

    rows = [everything[start : start + 256] for start in range(0, len(everything), 256)]
    assert [hex(ord(c)) for row in rows if not same(row) for c in row if not same([c])] == []


@settings(max_examples=30)
@given(ids=st.lists(st.integers(0, 300), max_size=10))
def test_any_ids_are_decoded_as_theirs(pair, ids):
    ours, theirs = pair
    for skip in (False, True):
        assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.equation("bert-config")
@settings(max_examples=30)
@given(first=texts.filter(known), second=texts.filter(known))
def test_frames_and_segments_are_theirs(pair, first, second):
    ours, theirs = pair
    theirs.encode_special_tokens = True
    for given_texts in ((first,), (first, second)):
        framed, expected = ours.frame_texts(*given_texts), theirs.encode(*given_texts)
        assert framed.ids.tolist() == expected.ids and framed.segments.tolist() == expected.type_ids
    theirs.encode_special_tokens = False


def test_the_older_post_processor_and_the_roles_are_read(tmp_path):
    theirs = bert()
    theirs.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    ours = read_tokenizer_json(written(theirs, tmp_path, **ROLES))
    framed, expected = ours.frame_texts("the", "class"), theirs.encode("the", "class")
    assert framed.ids.tolist() == expected.ids and framed.segments.tolist() == expected.type_ids
    assert [ours.special_id(role) for role in ("cls", "sep", "pad", "mask", "unk")] == [2, 3, 0, 4, None]


def test_what_comes_back_is_lowered_and_spaced():
    ours = WordPiece(["[UNK]", "hello", "##s", ",", "you", "."])
    ids = ours.encode("  HÉLLOs ,\tyou. unknowable ")
    assert ids.tolist() == [1, 2, 3, 4, 5, 0]
    assert ours.decode(ids) == "hellos, you. [UNK]"  # no special token here
    assert WordPiece(ours.vocabulary, cleanup=False).decode(ids) == "hellos , you . [UNK]"
    assert WordPiece(ours.vocabulary, longest=5).encode("hello hellos").tolist() == [1, 0]


def test_it_is_written_as_it_was_read_and_survives_being_saved(pair, tmp_path):
    ours, theirs = pair
    write_tokenizer_json(ours, tmp_path)
    assert read_tokenizer_json(tmp_path) == ours
    again = type(theirs).from_file(str(tmp_path / "tokenizer.json"))
    for text in ("The WoW [MASK] don't, é!", ""):
        assert again.encode(text, "x").ids == theirs.encode(text, "x").ids
        assert again.decode(again.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
    ours.save(tmp_path / "saved.json")
    assert WordPiece.load(tmp_path / "saved.json") == ours


def test_what_cannot_be_a_tokenizer_is_refused(pair, tmp_path):
    for change, sentence in (
        ({"unknown": "nothing"}, "the unknown token must be in the vocabulary"),
        ({"longest": -1}, "the longest word must be a count"),
        ({"frame": Frame((((9,), 0), ("A", 0)))}, r"the ids in the frame must be in \[0, 2\)"),
        ({"frame": Frame((("A", 0), ("A", 0)))}, "the texts in the frame must be A once"),
    ):
        with pytest.raises(ValueError, match=sentence):
            WordPiece(["[UNK]", "a"], **change)
    saved = json.loads(json.dumps(pair[0].to_dict()))
    for name in ("text", "added", "frame", "longest", "vocabulary"):
        (tmp_path / "saved.json").write_text(json.dumps({**saved, name: [[1]]}), encoding="utf-8")
        with pytest.raises(ValueError, match="not a usable tokenizer"):
            WordPiece.load(tmp_path / "saved.json")
