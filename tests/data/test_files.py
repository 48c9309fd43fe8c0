"""A file is replaced only when its successor is complete."""

import os

import pytest

from minillm.data import read_json, write_atomically, write_json


def test_a_written_file_holds_the_content_and_nothing_else_is_left(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_on_the_way_leaves_the_old_file(tmp_path, monkeypatch, step):
    write_atomically(tmp_path / "a", b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_json_goes_there_and_back(tmp_path):
    value = {"é": [1, 2.5, None, "😀"], "big": 1 << 100}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json", "test") == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1} x'])
def test_what_is_not_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"caller: the file .*v\.json must be complete JSON"):
        read_json(tmp_path / "v.json", "caller")
