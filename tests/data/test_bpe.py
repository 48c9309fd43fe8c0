"""Byte-pair encoding against the plainest possible programs for learning and applying merges."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as PeerTokenizer
from tokenizers import models

from minillm.data import BPETokenizer, bytes_per_token, python_docs_text
from minillm.data.bpe import SPLITS
from minillm.data.merges import apply_merges, learn_merges

pytestmark = pytest.mark.equation("tokenizer-bpe")

few_letters = st.lists(st.integers(0, 2), max_size=14).map(tuple)


def replace_pair(symbols, pair, new):
    out, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def plain_learning(words, n_merges, first_id, min_count):
    words = [(list(word), count) for word, count in words.items()]
    merges = []
    for new in range(first_id, first_id + n_merges):
        counts = Counter()
        for word, count in words:
            for pair in pairwise(word):
                counts[pair] += count
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        if counts[pair] < min_count:
            break
        merges.append(pair)
        words = [(replace_pair(word, pair, new), count) for word, count in words]
    return merges


@settings(max_examples=50)
@given(
    words=st.dictionaries(few_letters, st.integers(1, 4), max_size=8),
    n_merges=st.integers(0, 12),
    min_count=st.integers(1, 3),
)
def test_learning_equals_counting_again_after_every_merge(words, n_merges, min_count):
    assert learn_merges(words, n_merges, 3, min_count) == plain_learning(words, n_merges, 3, min_count)


@settings(max_examples=50)
@given(words=st.dictionaries(few_letters, st.integers(1, 4), min_size=1, max_size=6), word=few_letters)
def test_encoding_equals_going_through_the_merges_one_by_one(words, word):
    merges = plain_learning(words, 12, 3, 1)
    expected = list(word)
    for rank, pair in enumerate(merges):
        expected = replace_pair(expected, pair, 3 + rank)
    assert apply_merges(word, {pair: rank for rank, pair in enumerate(merges)}, range(3, 3 + len(merges))) == expected


def test_a_worked_example():
    # aa occurs 4 times; then (aa)a and ab twice each: (97, 98) is the smaller pair and wins the tie
    tokenizer = BPETokenizer.train("aaabdaaabac", 259, specials=(), split="none")
    assert tokenizer.merges == [(97, 97), (97, 98), (256, 257)]
    assert tokenizer.encode("aaabdaaabac").tolist() == [258, 100, 258, 97, 99]
    assert [tokenizer.decode([i]) for i in (256, 257, 258)] == ["aa", "ab", "aaab"]


def test_ties_do_not_depend_on_the_order_of_the_documents():
    documents = ["ab cd ef", "gh ab cd", "ef gh xy", "xy é é"]
    expected = BPETokenizer.train(documents, 275)
    for seed in range(5):
        shuffled = documents[:]
        random.Random(seed).shuffle(shuffled)
        assert BPETokenizer.train(shuffled, 275) == expected


def test_merges_do_not_cross_documents():
    assert BPETokenizer.train(["xa", "bx", "ax", "xb"], 300, split="none").merges == []
    assert BPETokenizer.train("xabx" * 2, 300, split="none").merges != []


def test_a_library_with_our_merges_encodes_alike():
    text = python_docs_text()[:60_000]
    ours = BPETokenizer.train(text[:50_000], 700, specials=(), split="none")
    name = [chr(0x4E00 + i) for i in range(256)]  # one character a byte, none of them white space
    for a, b in ours.merges:
        name.append(name[a] + name[b])
    merges = [(name[a], name[b]) for a, b in ours.merges]
    peer = PeerTokenizer(models.BPE(vocab={token: i for i, token in enumerate(name)}, merges=merges))
    for sample in (text[50_000:], "a" * 101, " " * 64, "-" * 1000):
        expected = peer.encode("".join(name[byte] for byte in sample.encode())).ids
        assert ours.encode(sample).tolist() == expected


@settings(max_examples=50)
@given(text=st.text() | st.text("aB1 ²_'\n\t.s—é́\u3000\udcff"))
@pytest.mark.parametrize("split", ["gpt2", "words"])
def test_pieces_join_to_the_text(split, text):
    assert "".join(SPLITS[split].findall(text)) == text


def test_pieces_keep_words_numbers_and_signs_apart():
    assert SPLITS["gpt2"].findall("I've 12 cats,  it's a_b\n\n x") == [
        *["I", "'ve", " 12", " cats", ",", " ", " it", "'s", " a", "_", "b", "\n\n", " x"]
    ]
    assert SPLITS["words"].findall("I've 12 cats,  yes") == ["I've", " 12", " cats,", " ", " yes"]


def test_whole_characters_get_ids_and_rare_ones_fall_back_on_bytes():
    text = "é" * 60 + "ü" * 39 + "ß"
    tokenizer = BPETokenizer.train(text, 258, specials=(), alphabet="characters", character_coverage=0.99)
    assert tokenizer.characters == "éü" and tokenizer.merges == []
    assert tokenizer.encode("éüß😀").tolist() == [256, 257, *"ß😀".encode()]
    bytes_only = BPETokenizer.train(text, 258, specials=(), alphabet="characters", character_coverage=0.0)
    assert bytes_only.characters == ""


def test_characters_leave_room_for_what_was_asked():
    text = "".join(chr(0x4E00 + i) for i in range(100)) * 2
    tokenizer = BPETokenizer.train(text, 270, alphabet="characters")
    assert tokenizer.vocab_size == 270 and len(tokenizer.characters) == 11


@pytest.mark.parametrize("specials", [(), ("bos", "eos", "pad")])
def test_the_vocabulary_has_the_size_asked_for_or_stops_when_nothing_repeats(specials):
    assert BPETokenizer.train(python_docs_text()[:20_000], 400, specials=specials).vocab_size == 400
    assert BPETokenizer.train("abc", 400, specials=specials).vocab_size == 256 + len(specials)
    assert BPETokenizer.train("abc", 256 + len(specials), specials=specials).merges == []


def test_merges_shorten_unseen_text():
    text = python_docs_text()
    small, large = (BPETokenizer.train(text[:100_000], size) for size in (300, 1000))
    unseen = text[100_000:130_000]
    assert 1 < bytes_per_token(small, unseen) < bytes_per_token(large, unseen)
    assert bytes_per_token(large, unseen) > 2.5


def test_a_long_unbroken_run_is_encoded_in_reasonable_time():
    tokenizer = BPETokenizer.train("ab " * 50 + "a" * 64, 300)
    ids = tokenizer.encode("a" * 30_000)  # quadratic work would take minutes here
    assert tokenizer.decode(ids) == "a" * 30_000


def test_refusals():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 256 bytes \+ 3 special tokens, got 258"):
        BPETokenizer.train("abc", 258)
    for empty in ("", b"", [], ["", ""]):
        with pytest.raises(ValueError, match="text must be at least one character"):
            BPETokenizer.train(empty, 300)
    with pytest.raises(ValueError, match="split must be one of"):
        BPETokenizer.train("abc", 300, split="bert")
    with pytest.raises(ValueError, match="alphabet must be one of"):
        BPETokenizer.train("abc", 300, alphabet="runes")
    with pytest.raises(TypeError, match="str or bytes"):
        BPETokenizer.train([1, 2], 300)
    with pytest.raises(ValueError, match="bytes_per_token"):
        bytes_per_token(BPETokenizer([]), "")
