"""Files tokenizer.json from outside: what is refused in one sentence, and what mutations of every kind do."""

import json

import numpy as np
import pytest

from minillm.data.gguf import parse_gguf
from minillm.data.gguf_tokenizer import tokenizer_from_gguf
from minillm.data.pretrained_bpe import PretrainedBPE, byte_alphabet
from minillm.data.sentencepiece_bpe import Spaces
from minillm.data.tokenizer_json import read_tokenizer_json, write_tokenizer_json
from tests.oracles.gguf_files import gguf_bytes
from tests.oracles.tokenizer_files import bert, sentencepiece, tokenizers


def put(folder, state) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")


def changed(state: dict, path: str, value) -> dict:
    """A copy with one entry, named with dots, replaced."""
    copy = json.loads(json.dumps(state))
    inner = copy
    *names, last = path.split(".")
    for name in names:
        inner = inner[int(name) if isinstance(inner, list) else name]
    inner[int(last) if isinstance(inner, list) else last] = value
    return copy


PREPEND, METASPACE = {"type": "Prepend", "prepend": "▁"}, {"type": "Metaspace", "replacement": "▁"}
REFUSED = {
    "a suffix": ("sentencepiece", "model.end_of_word_suffix", "</w>", "end_of_word_suffix .* must be none, got </w>"),
    "a flag": ("sentencepiece", "model.byte_fallback", "yes", "the flags in .* must be true or false"),
    "another normaliser": (
        "sentencepiece",
        "normalizer",
        {"type": "NFKC"},
        "the normaliser .* must be none, or Replace",
    ),
    "half a normaliser": ("sentencepiece", "normalizer", PREPEND, "the normaliser .* must be none, or Replace"),
    "two cuts": ("sentencepiece", "pre_tokenizer", METASPACE, "the cut in .* must be none beside a normaliser"),
    "another decoder": ("sentencepiece", "decoder", {"type": "Metaspace"}, "the decoder .* must be Replace"),
    "spaces at the end": ("sentencepiece", "decoder.decoders.3.stop", 1, "the decoder .* must be Replace"),
    "a word only": ("sentencepiece", "added_tokens.0.single_word", True, r"an added token .* \(single_word\)"),
    "an id twice": ("sentencepiece", "added_tokens.1.id", 5, "the ids in .* must be 0, 1, 2"),
    "a fraction": ("sentencepiece", "model.vocab.▁", 5.0, "the ids in .* must be 0, 1, 2"),
    "a merge of three": ("sentencepiece", "model.merges.4", "a b c", "merge 4 in .* must be of two tokens"),
    "an unknown merge": ("sentencepiece", "model.merges.4", ["a", "漢"], "merge 4 must be of two tokens"),
    "another frame": ("sentencepiece", "post_processor", {"type": "Roberta"}, "the post_processor in .* got Roberta"),
    "a frame of B": (
        "sentencepiece",
        "post_processor.single.1.Sequence.id",
        "B",
        "the texts in the frame must be A once",
    ),
    "a frame outside": ("sentencepiece", "post_processor.special_tokens.<s>.ids", [10**9], "the ids in the frame"),
    "no model": ("sentencepiece", "model", [], "the description of a tokenizer"),
    "another cut": (
        "wordpiece",
        "pre_tokenizer",
        {"type": "Whitespace"},
        "the pre_tokenizer .* must be BertPreTokenizer",
    ),
    "a step": ("wordpiece", "normalizer.lowercase", None, "the normalizer in .* must be steps that are true or false"),
    "two prefixes": ("wordpiece", "decoder.prefix", "@@", "the prefix in .* must be one text in model and decoder"),
    "no unknown": ("wordpiece", "model.unk_token", "<nothing>", "the unknown token must be in the vocabulary"),
    "a length": ("wordpiece", "model.max_input_chars_per_word", "long", "the longest word must be a count"),
    "a surrogate": ("wordpiece", "model.vocab", {"[UNK]": 0, "\ud800": 1}, "the ids|valid Unicode"),
}
FILES = {"sentencepiece": lambda: sentencepiece("llama-2"), "wordpiece": bert}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_do_not_have_is_refused_in_one_sentence(tmp_path, case):
    kind, path, value, words = REFUSED[case]
    put(tmp_path, changed(json.loads(FILES[kind]().to_str()), path, value))
    with pytest.raises(ValueError, match=words) as found:
        read_tokenizer_json(tmp_path)
    assert "\n" not in str(found.value)


def test_metaspace_must_agree_with_itself_and_defaults_as_in_the_library(tmp_path):
    state = json.loads(sentencepiece("always-split").to_str())
    put(tmp_path, changed(state, "pre_tokenizer", METASPACE))
    assert read_tokenizer_json(tmp_path).spaces == Spaces("always", False, True, 1)
    for wrong in ({"prepend_scheme": "last"}, {"add_prefix_space": False}, {"split": "often"}, {"replacement": "_"}):
        put(tmp_path, changed(state, "pre_tokenizer", {**METASPACE, **wrong}))
        with pytest.raises(ValueError, match=r"prepend_scheme|split|the cut"):
            read_tokenizer_json(tmp_path)


@pytest.mark.parametrize("shape", ["bos", "eos", "roberta"])
def test_byte_level_files_say_what_a_text_begins_with(tmp_path, shape):
    specials = {"<s>": 256, "</s>": 257}
    write_tokenizer_json(PretrainedBPE([*byte_alphabet(), *specials], [], specials=specials), tmp_path)
    process = tokenizers.processors
    template = {"bos": "<s> $A", "eos": "$A </s>", "roberta": ""}[shape]
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.post_processor = (
        process.TemplateProcessing(single=template, pair=f"{template} $B", special_tokens=list(specials.items()))
        if template
        else process.RobertaProcessing(("</s>", 257), ("<s>", 256))
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer_json(tmp_path)
    assert ours.adds_bos == (shape != "eos") and ours.bos_id == (256 if shape != "eos" else None)
    assert ours.encode("a b", bos=ours.adds_bos).tolist() == [i for i in theirs.encode("a b").ids if i != 257]
    write_tokenizer_json(ours, tmp_path)
    assert read_tokenizer_json(tmp_path).adds_bos == ours.adds_bos


def test_files_nested_without_end_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(ValueError, match="complete JSON"):
        read_tokenizer_json(tmp_path)


def byte_level(folder) -> dict:
    write_tokenizer_json(PretrainedBPE([*byte_alphabet(), "in"], [("i", "n")], specials={}), folder)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


STRANGE = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    float("inf"),
    "",
    "▁",
    "\ud800",
    "Sequence",
    [],
    [[]],
    {},
    {"type": "BPE"},
    [None],
    ["a", "b"],
]


def places(value, path=()) -> list[tuple]:
    """The ways to every entry, but for a few of the many tokens and merges only."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [path, *(way for name, inner in items[:12] for way in places(inner, (*path, name)))]


def mutated(state: dict, rng: np.random.Generator) -> dict:
    """One or two entries replaced by something strange, taken out, or exchanged."""
    state = json.loads(json.dumps(state))
    for _ in range(rng.integers(1, 3)):
        ways = places(state)[1:]
        if not ways:
            break
        way = ways[rng.integers(len(ways))]
        inner = state
        for name in way[:-1]:
            inner = inner[name]
        kind = rng.integers(3)
        if kind == 0:
            inner[way[-1]] = STRANGE[rng.integers(len(STRANGE))]
        elif kind == 1:
            del inner[way[-1]]
        else:
            other = ways[rng.integers(len(ways))]
            if other[: len(way)] != way and way[: len(other)] != other:
                there = state
                for name in other[:-1]:
                    there = there[name]
                inner[way[-1]], there[other[-1]] = there[other[-1]], inner[way[-1]]
    return state


def fuzz(folder, n: int, seed: int) -> tuple[int, int]:
    """Read n mutated files of each kind; how many were refused, and how many could be used."""
    rng = np.random.default_rng(seed)
    states = [json.loads(sentencepiece(kind, added=True).to_str()) for kind in ("llama-2", "first-whole")]
    states += [json.loads(bert(added=True).to_str()), byte_level(folder)]
    refused = usable = 0
    for state in states:
        for _ in range(n):
            put(folder, mutated(state, rng))
            if rng.integers(6) == 0:  # bytes of the file itself, too
                data = bytearray((folder / "tokenizer.json").read_bytes())
                place = int(rng.integers(len(data)))
                data[place : place + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(4)))
                (folder / "tokenizer.json").write_bytes(bytes(data))
            try:
                tokenizer = read_tokenizer_json(folder)
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error), error
                continue
            usable += 1
            ids = tokenizer.encode(" the <s> wow 漢\t[MASK] <r>\n\n")
            assert isinstance(tokenizer.decode(ids), str) and tokenizer.to_dict()
            write_tokenizer_json(tokenizer, folder)
    return refused, usable


def test_400_mutated_files_give_an_error_or_a_tokenizer(tmp_path):
    refused, usable = fuzz(tmp_path, 100, seed=0)
    assert refused > 150 and usable > 25


@pytest.mark.slow
def test_6000_mutated_files_give_an_error_or_a_tokenizer(tmp_path):
    refused, usable = fuzz(tmp_path, 1500, seed=1)
    print(f"{refused} refused, {usable} usable")
    assert refused > 2000 and usable > 200


def sentencepiece_entries(**changes) -> dict:
    texts = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abn",
        "an",
        "▁b",
        "▁ban",
        "ana",
        "<|t|>",
    ]
    kinds = [2, 3, 3, *([6] * 256), *([1] * 8), 4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [0.0] * 263 + [-1.0, -3.0, -4.0, -2.0, 0.0],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


def from_gguf(folder, **changes):
    return tokenizer_from_gguf(parse_gguf(gguf_bytes(sentencepiece_entries(**changes), {}), folder / "t.gguf"))


@pytest.mark.equation("tokenizer-bpe")
def test_a_gguf_file_with_scores_is_read(tmp_path):
    ours = from_gguf(tmp_path)
    shown = [ours.vocabulary[i] for i in ours.encode("banana n<|t|>é", bos=ours.adds_bos)]
    # an (-1) twice, then ana (-2), of an and a; then ▁b (-3), and ▁ban (-4), of ▁b and an
    assert shown == ["<s>", "▁ban", "ana", "▁", "n", "<|t|>", "▁", "<0xC3>", "<0xA9>"]
    assert (ours.adds_bos, ours.bos_id, ours.eos_id, ours.special_id("<unk>")) == (True, 1, 2, 0)
    assert ours.decode(ours.encode(" ban an")) == " ban an"
    bare = from_gguf(tmp_path, **{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    assert bare.encode("b").tolist() == [ours.vocabulary.index("b")] and not bare.adds_bos
    assert bare.decode(bare.encode(" b")) == " b"


def test_a_gguf_file_whose_tokens_do_not_fit_is_refused(tmp_path):
    for change, words in (
        ({"tokenizer.ggml.scores": [1.0]}, "tokenizer.ggml.scores must be 268 numbers, one each"),
        ({"tokenizer.ggml.token_type": ["a"] * 268}, "tokenizer.ggml.token_type must be 268 numbers"),
        ({"tokenizer.ggml.model": "t5"}, "must be byte-level BPE .gpt2. or SentencePiece .llama., got t5"),
        ({"tokenizer.ggml.bos_token_id": 999}, "the id of bos must be in"),
    ):
        with pytest.raises(ValueError, match=words):
            from_gguf(tmp_path, **change)
