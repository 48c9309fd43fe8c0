"""Checkpoints: what is written comes back to the bit, and no damaged or foreign file gets through."""

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from minillm.models import Config, Decoder
from minillm.training import checkpoint as module
from minillm.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    checkpoints_in,
    keep_newest,
    latest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from minillm.training.restore import decoder_shapes, load_model

CONFIG = Config(11, 8, 2, 2, n_kv_heads=1, d_ff=12, context=6)


def make(config: Config = CONFIG) -> Checkpoint:
    model = Decoder(config, np.random.default_rng(0))
    tensors = {f"model.{name}": array for name, array in model.state_dict().items()}
    tensors |= {"optimizer.t": np.asarray(3, np.int64), "optimizer.m.0": np.zeros((0, 2), np.float32)}
    generator = np.random.default_rng(5).bit_generator.state
    return Checkpoint(tensors, {"step": 3, "config": {"model": config.to_dict()}, "rng": generator, "tokenizer": None})


@pytest.fixture
def file(tmp_path):
    path = checkpoint_path(tmp_path, 3)
    write_checkpoint(path, make())
    return path


def test_tensors_and_record_come_back_to_the_bit(file):
    saved, read = make(), read_checkpoint(file)
    assert read.record == saved.record and read.tensors.keys() == saved.tensors.keys()
    for name, array in saved.tensors.items():
        assert read.tensors[name].dtype == array.dtype and read.tensors[name].shape == array.shape
        np.testing.assert_array_equal(read.tensors[name], array)
    assert read.part("optimizer").keys() == {"t", "m.0"}


def test_a_generator_goes_on_from_its_saved_state(file):
    rng = np.random.default_rng()
    rng.bit_generator.state = read_checkpoint(file).record["rng"]
    np.testing.assert_array_equal(rng.random(5), np.random.default_rng(5).random(5))


def test_it_is_a_safetensors_file_without_pickle(file):
    from safetensors.numpy import load_file

    assert "model.embedding.weight" in load_file(file)
    assert b"pickle" not in file.read_bytes()


@given(st.data())
@settings(max_examples=50)
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "checkpoint-00000003.safetensors"
    write_checkpoint(path, make())
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match=r"^read_checkpoint: the file .* must be a complete minillm checkpoint, got"):
        read_checkpoint(path)


@given(st.data())
@settings(max_examples=100)
def test_a_flipped_bit_anywhere_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "checkpoint-00000003.safetensors"
    write_checkpoint(path, make())
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        read = read_checkpoint(path)
    except ValueError as error:
        assert str(error).startswith("read_checkpoint: the file ")
    else:  # white space that pads the header: the contents are as they were
        assert read.record == make().record
        for name, array in make().tensors.items():
            np.testing.assert_array_equal(read.tensors[name], array)


FOREIGN = {
    "empty": (b"", "one of 0 bytes"),
    "text": (b"To be, or not to be", "header claims"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00.", "header claims"),
    "zip": (b"PK\x03\x04" + bytes(40), "header claims"),
    "huge header": (struct.pack("<Q", 1 << 62) + b"{}", "header claims 4611686018427387904"),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", "header claims 100"),
    "no JSON": (struct.pack("<Q", 4) + b"{{{{", "a damaged one"),
    "huge tensor": (
        struct.pack("<Q", 70)
        + b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'.ljust(70)
        + b"0000",
        "a damaged one",
    ),
    "deep": (struct.pack("<Q", 20000) + b"[" * 20000, "a damaged one"),
    "other safetensors": (save({"x": np.zeros(3)}), "a safetensors file from elsewhere"),
    "other metadata": (save({"x": np.zeros(3)}, {"format": "pt"}), "a safetensors file from elsewhere"),
    "no checksum": (save({"x": np.zeros(3)}, {"format": module.FORMAT}), "checksum is wrong"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused_in_one_sentence(tmp_path, kind):
    content, words = FOREIGN[kind]
    path = tmp_path / "checkpoint-00000001.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_bad_file_names_the_good_one_before_it(tmp_path, file):
    bad = checkpoint_path(tmp_path, 9)
    bad.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"The one before it is {file}"):
        read_checkpoint(latest_checkpoint(tmp_path))


def test_a_folder_without_checkpoints_or_a_missing_path_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder without any"):
        latest_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        latest_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="which is none"):
        read_checkpoint(tmp_path / "nowhere.safetensors")


def test_the_newest_are_kept_and_leftovers_of_a_killed_writer_removed(tmp_path, file):
    for step in (100, 20, 7):
        write_checkpoint(checkpoint_path(tmp_path, step), make())
    (tmp_path / ".checkpoint-00000200.safetensors.1234.partial").write_bytes(b"half")
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 100)
    assert latest_checkpoint(file) == file
    keep_newest(tmp_path, 2)
    assert checkpoints_in(tmp_path) == [checkpoint_path(tmp_path, 20), checkpoint_path(tmp_path, 100)]
    assert sorted(os.listdir(tmp_path))[-1] == "notes.safetensors" and len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(file, monkeypatch, moment):
    before = file.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(file, make())
    monkeypatch.undo()
    assert file.read_bytes() == before and len(os.listdir(file.parent)) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_with_its_configuration(tmp_path, tied):
    config = Config(11, 8, 2, 2, d_ff=12, context=6, tied=tied, rope_pairing="half", norm_eps=1e-3)
    write_checkpoint(checkpoint_path(tmp_path, 1), make(config))
    restored = load_model(tmp_path)
    assert restored.model.config == config and restored.tokenizer is None
    ids = np.arange(6)[None]
    np.testing.assert_array_equal(restored.model(ids).data, Decoder(config, np.random.default_rng(0))(ids).data)


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"n_kv_heads": 4, "n_heads": 4, "n_layers": 1}])
def test_the_shapes_of_a_configuration_are_those_of_its_decoder(changes):
    config = Config(**{**CONFIG.to_dict(), **changes})
    model = Decoder(config, np.random.default_rng(0))
    assert decoder_shapes(config) == {name: array.shape for name, array in model.state_dict().items()}


def change_tensor(saved: Checkpoint, name: str, array: np.ndarray | None) -> Checkpoint:
    tensors = {k: v for k, v in saved.tensors.items() if k != name}
    return Checkpoint(tensors if array is None else {**tensors, name: array}, saved.record)


def change_config(saved: Checkpoint, **changes) -> Checkpoint:
    model = {**saved.record["config"]["model"], **changes}
    return Checkpoint(saved.tensors, {**saved.record, "config": {"model": model}})


WRONG = {
    "missing tensor": (
        lambda c: change_tensor(c, "model.final_norm.gain", None),
        r"final_norm.gain in .* must be of shape \(8,\), as its configuration says, got none",
    ),
    "extra tensor": (lambda c: change_tensor(c, "model.bias", np.zeros(2)), r"bias in .* of shape absent"),
    "wrong shape": (
        lambda c: change_tensor(c, "model.head.weight", np.zeros((11, 9), np.float32)),
        r"head.weight in .* must be of shape \(11, 8\), as its configuration says, got \(11, 9\)",
    ),
    "other width": (lambda c: change_config(c, d_model=16), "got"),
    "a width that no memory holds": (lambda c: change_config(c, d_model=10**9), r"of shape"),
    "layers that no memory holds": (
        lambda c: change_config(c, n_layers=10**12),
        "the layers in .* must be 1000000000000, got 2",
    ),
    "a context that no memory holds": (lambda c: change_config(c, context=10**12), "the context must be at most"),
    "unknown setting": (lambda c: change_config(c, colour="blue"), "does not describe its model"),
    "no configuration": (lambda c: Checkpoint(c.tensors, {"step": 3}), "does not describe its model"),
    "impossible setting": (lambda c: change_config(c, n_heads=3), "Config"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_tensors_that_are_not_those_of_the_configuration_are_refused(tmp_path, kind):
    change, words = WRONG[kind]
    write_checkpoint(checkpoint_path(tmp_path, 1), change(make()))
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path)


def test_bfloat16_files_of_others_are_refused_without_a_crash(tmp_path):
    header = json.dumps(
        {"__metadata__": {"format": module.FORMAT}, "x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    )
    path = tmp_path / "checkpoint-00000001.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    with pytest.raises(ValueError, match="must be a complete minillm checkpoint"):
        read_checkpoint(path)


def test_a_file_saved_by_the_library_itself_is_foreign(tmp_path):
    save_file({"model.embedding.weight": np.zeros((2, 2))}, tmp_path / "checkpoint-00000001.safetensors")
    with pytest.raises(ValueError, match="from elsewhere"):
        load_model(tmp_path)
