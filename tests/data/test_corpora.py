"""Text from Python itself, from files and from folders; held-out parts; compressors to compare with."""

import importlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import (
    compressed_bits_per_byte,
    load_documents,
    load_text,
    python_docs,
    python_docs_text,
    split_held_out,
)


def test_the_reference_pages_of_python_are_a_long_english_text():
    text = python_docs_text()
    assert 300_000 < len(text) < 1_000_000
    assert text == "\n".join(python_docs()) and len(python_docs()) > 50
    assert "assert" in python_docs()[0]
    assert text.count(" the ") > 3000


def test_a_python_without_them_says_what_to_do(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(FileNotFoundError, match="full standard library"):
        python_docs()


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("é 😀\r\n".encode())
    assert load_text(tmp_path / "a.txt") == "é 😀\r\n"
    assert load_text(str(tmp_path / "a.txt")) == "é 😀\r\n"


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.md", ".hidden.txt", ".git/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert load_documents(tmp_path) == ["a/y.md", "a/z.txt", "b.txt"]
    assert load_documents(tmp_path, "*.txt") == ["a/z.txt", "b.txt"]
    assert load_text(tmp_path) == "a/y.md\na/z.txt\nb.txt"


def test_a_folder_skips_what_is_no_text_and_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"\x00\x01")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.warns(UserWarning, match=r"skipped 2 file\(s\).*b\.bin"):
        assert load_documents(tmp_path) == ["text"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b" \n", "white space only"),
        (b"abc\x00", "binary file .zero byte at 3"),
        (b"caf\xe9s", "byte 0xe9 at 3, which is not UTF-8"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path, content, said):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"the file .*a\.txt must be text.*{said}"):
        load_text(tmp_path / "a.txt")


def test_missing_paths_and_folders_without_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Check the spelling"):
        load_text(tmp_path / "nothing")
    with pytest.raises(ValueError, match="text files matching"):
        load_text(tmp_path)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_a_folder_that_holds_itself_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.symlink(tmp_path, tmp_path / "again")
    assert load_documents(tmp_path) == ["text"]


@settings(max_examples=40)
@given(n=st.integers(2, 300), share=st.floats(0.01, 0.99))
def test_the_held_out_part_is_the_end(n, share):
    data = np.arange(n)
    if not 0 < round(n * share) < n:
        with pytest.raises(ValueError, match="long enough for two parts"):
            split_held_out(data, share)
        return
    train, held_out = split_held_out(data, share)
    np.testing.assert_array_equal(np.concatenate([train, held_out]), data)
    assert abs(len(held_out) - n * share) <= 0.5


def test_any_sequence_can_be_split_and_the_default_is_a_tenth():
    assert split_held_out("x" * 95 + "y" * 10) == ("x" * 95, "y" * 10)
    assert split_held_out(list(range(10))) == (list(range(9)), [9])
    assert split_held_out(b"ab", 0.5) == (b"a", b"b")
    for share in (0, 1, -0.1):
        with pytest.raises(ValueError, match="share must be between 0 and 1"):
            split_held_out("abc", share)


def test_compressors_in_bits_per_byte():
    noise = np.random.default_rng(0).bytes(20_000)
    for method in ("gzip", "bzip2", "xz"):
        assert 8 <= compressed_bits_per_byte(noise, method) < 8.2
        assert compressed_bits_per_byte(b"ab" * 10_000, method) < 0.1
        text = python_docs_text().encode()[:20_000]
        assert 1.5 < compressed_bits_per_byte(text, method) < 4
    # behind itself a text costs next to nothing
    assert compressed_bits_per_byte(noise, "xz", primed_with=noise) < 0.2
    with pytest.raises(ValueError, match="method must be one of 'gzip', 'bzip2', 'xz'"):
        compressed_bits_per_byte(noise, "zip")
    with pytest.raises(ValueError, match="at least one byte"):
        compressed_bits_per_byte(b"", "xz")
