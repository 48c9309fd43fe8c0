"""Safetensors files: the format's own package, bfloat16 and FP8, and files that are damaged or hostile."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from minillm.data.float_formats import round_float
from minillm.data.safetensors_files import STORAGE, parse_safetensors, read_safetensors, write_safetensors

TORCH = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def some_arrays():
    rng = np.random.default_rng(0)
    kinds = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
    arrays = {kind: (rng.normal(size=(2, 3)) * 50).astype(kind) for kind in kinds if kind[0] != "u"}
    arrays |= {kind: rng.integers(0, 200, (3, 1)).astype(kind) for kind in kinds if kind[0] == "u"}
    empty = np.zeros((0, 5), np.float32)
    return arrays | {"flags": rng.random((4,)) < 0.5, "scalar": np.array(2.5, np.float32), "empty": empty}


def equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_array_equal(left[name], right[name])
        assert left[name].shape == right[name].shape


def test_the_packages_files_are_read_and_ours_are_read_by_the_package(tmp_path):
    arrays = some_arrays()
    save_file(arrays, tmp_path / "theirs", {"format": "np"})
    theirs = read_safetensors(tmp_path / "theirs")
    equal(theirs.numpy(), arrays)
    assert theirs.metadata == {"format": "np"}
    write_safetensors(tmp_path / "ours", arrays, metadata={"é": "ß"})
    equal(load_file(tmp_path / "ours"), arrays)
    equal(read_safetensors(tmp_path / "ours").numpy(), arrays)
    assert read_safetensors(tmp_path / "ours").metadata == {"é": "ß"}
    write_safetensors(tmp_path / "none", {})
    assert read_safetensors(tmp_path / "none").tensors == {}


@pytest.mark.equation("bf16", "fp8-e4m3", "fp8-e5m2")
@pytest.mark.parametrize("dtype", TORCH)
def test_short_floats_which_numpy_has_not(tmp_path, dtype):
    x = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    theirs = torch.from_numpy(x).to(TORCH[dtype])
    save_torch({"x": theirs, "y": theirs[0].clone()}, str(tmp_path / "theirs"))
    found = read_safetensors(tmp_path / "theirs")
    assert found.tensors["x"].dtype == dtype
    np.testing.assert_array_equal(found.numpy()["x"], theirs.float().numpy())
    assert found.numpy()["x"].dtype == np.float32
    write_safetensors(tmp_path / "ours", {"x": x, "n": np.arange(3)}, dtypes=dtype)
    again = read_safetensors(tmp_path / "ours")
    np.testing.assert_array_equal(again.numpy()["x"], theirs.float().numpy())
    np.testing.assert_array_equal(again.numpy()["n"], np.arange(3))
    assert (tmp_path / "ours").stat().st_size < (tmp_path / "theirs").stat().st_size + 100


@pytest.mark.equation("bf16")
def test_stored_codes_are_those_of_ml_dtypes(tmp_path):
    x = np.random.default_rng(2).normal(size=100).astype(np.float32)
    write_safetensors(tmp_path / "a", {"x": x}, dtypes={"x": "BF16"})
    tensor = read_safetensors(tmp_path / "a").tensors["x"]
    np.testing.assert_array_equal(tensor.codes(), x.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(tensor.numpy(), round_float(x, "bf16"))


def test_tensors_are_views_of_the_file_and_cannot_be_written_to(tmp_path):
    write_safetensors(tmp_path / "a", {"x": np.ones((1000, 1000), np.float32)})
    tracemalloc.start()
    found = read_safetensors(tmp_path / "a").numpy()["x"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000 and found.sum() == 1e6  # the four megabytes were not copied
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 2


def file_of(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EIGHT = bytes(8)
HOSTILE = {
    "length beyond the file": (b"{}", b"", 1 << 62, "the length of the header"),
    "length of zero": (b"{}", b"", 0, "the length of the header"),
    "not UTF-8": (b"\xff{}", b"", None, "JSON in UTF-8"),
    "not JSON": (b"{,}", b"", None, "JSON in UTF-8"),
    "nested too deep": (b"[" * 200_000, b"", None, "the header"),
    "a list": (b"[1]", b"", None, "must be a JSON object, got a list"),
    "a number of many digits": (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "the header"),
    "a name twice": (b'{"a": 1, "a": 1}', b"", None, "a name twice"),
    "metadata that are no texts": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "metadata that are no object": ({"__metadata__": "a"}, b"", None, "__metadata__"),
    "an entry that is no object": ({"a": 3}, b"", None, "the entry 'a'"),
    "an entry with more": ({"a": entry() | {"x": 1}}, EIGHT, None, "the entry 'a'"),
    "an unknown dtype": ({"a": entry("F4")}, EIGHT, None, "the dtype of 'a'"),
    "a dtype that is a list": ({"a": entry(["F32"])}, EIGHT, None, "the dtype of 'a'"),
    "a negative size": ({"a": entry(shape=(-2,))}, EIGHT, None, "the shape of 'a'"),
    "a size that is true": ({"a": entry(shape=(True, 2))}, EIGHT, None, "the shape of 'a'"),
    "a fraction": ({"a": entry(shape=(2.0,))}, EIGHT, None, "the shape of 'a'"),
    "sizes that wrap around": ({"a": entry(shape=(2**33, 2**31))}, EIGHT, None, "the shape of 'a'"),
    "nothing of a huge shape": ({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b"", None, "the shape of 'a'"),
    "too many dimensions": ({"a": entry(shape=(1,) * 40)}, EIGHT, None, "the shape of 'a'"),
    "offsets too far apart": ({"a": entry(offsets=(0, 12))}, bytes(12), None, "the offsets of 'a'"),
    "offsets that are turned": ({"a": entry(offsets=(8, 0))}, EIGHT, None, "the offsets of 'a'"),
    "one offset": ({"a": entry(offsets=(0,))}, EIGHT, None, "the offsets of 'a'"),
    "a gap": ({"a": entry(offsets=(4, 12))}, bytes(12), None, "the place of 'a'"),
    "an overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None, "the place of 'b'"),
    "past the end": ({"a": entry()}, bytes(7), None, "the place of 'a'"),
    "bytes left over": ({"a": entry()}, bytes(9), None, "the tensors' bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_end_in_one_clear_error(tmp_path, case):
    header, body, length, said = HOSTILE[case]
    with pytest.raises(ValueError, match=r"^read_safetensors: .* must be .*, got ") as caught:
        read_safetensors(file_of(tmp_path / "a", header, body, length))
    assert said in str(caught.value) and len(str(caught.value)) < 600


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="read_safetensors: there is no file"):
        read_safetensors(tmp_path / "none")
    with pytest.raises(ValueError, match=r"read_safetensors: .* must be a file, got a folder"):
        read_safetensors(tmp_path)
    for content in (b"", b"1234567"):
        (tmp_path / "short").write_bytes(content)
        with pytest.raises(ValueError, match="read_safetensors: the length of the header"):
            read_safetensors(tmp_path / "short")


def mutated(rng, whole):
    """One of: bytes changed, a cut, bytes put in or taken out, a digit of the header changed, another length."""
    content = bytearray(whole)
    header = struct.unpack("<Q", whole[:8])[0]
    where = int(rng.integers(len(content) if rng.random() < 0.2 else 8 + header))
    match rng.integers(6):
        case 0:
            for at in rng.integers(len(content), size=rng.integers(1, 4)):
                content[at] = rng.integers(256)
        case 1:
            del content[where:]
        case 2:
            content[where:where] = rng.integers(256, size=rng.integers(1, 9), dtype=np.uint8).tobytes()
        case 3:
            del content[where : where + int(rng.integers(1, 9))]
        case 4:
            digits = [i for i in range(8, 8 + header) if chr(content[i]).isdigit()]
            at = digits[rng.integers(len(digits))]
            content[at : at + 1] = str(rng.integers(10 ** int(rng.integers(1, 19)))).encode()
            content[:8] = struct.pack("<Q", header + len(content) - len(whole))
        case _:
            content[:8] = struct.pack("<Q", int(rng.integers(2 ** int(rng.integers(1, 64)))))
    return bytes(content)


def fuzz(path, mutants, on_disk):
    rng = np.random.default_rng(mutants)
    write_safetensors(
        path, {"a": np.ones((2, 3), np.float32), "b": np.arange(5), "c": np.ones(3, bool)}, metadata={"a": "b"}
    )
    plain = path.read_bytes()
    write_safetensors(path, {"w": np.ones((3, 4)), "v": np.ones(2)}, dtypes="BF16")
    wholes, refused = [plain, path.read_bytes()], 0
    if on_disk:  # tracing is slow
        tracemalloc.start()
    for i in range(mutants):
        content = mutated(rng, wholes[i % 2])
        if on_disk:
            path.write_bytes(content)
        try:
            arrays = (read_safetensors(path) if on_disk else parse_safetensors(path, content)).numpy()
            assert sum(array.nbytes for array in arrays.values()) <= 4 * len(content)
        except ValueError as error:
            assert str(error).startswith("read_safetensors: ") and len(str(error)) < 900
            refused += 1
    if on_disk:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000
    assert refused > 0.5 * mutants  # other bytes in a tensor, or in a name, are another sound file


def test_mutated_files(tmp_path):
    fuzz(tmp_path / "m", 150, on_disk=True)


@pytest.mark.slow
def test_ten_thousand_mutated_files(tmp_path):
    fuzz(tmp_path / "m", 10_000, on_disk=False)


def test_what_cannot_be_written_is_refused(tmp_path):
    path, ones = tmp_path / "a", np.ones(2, np.float32)
    for arrays, keywords, said in [
        ({"a": np.ones(2, complex)}, {}, "'a' must be of a type that safetensors has"),
        ({"a": ones}, {"dtypes": {"a": "F64"}}, "'a' must be stored as it is or in BF16"),
        ({"a": ones}, {"dtypes": {"a": "F4"}}, "the dtype of 'a' must be one of"),
        ({"a": ones}, {"dtypes": {"b": "BF16"}}, "dtypes must be for tensors that are there"),
        ({"__metadata__": ones}, {}, "the names must be other than __metadata__"),
        ({"a": ones}, {"metadata": {"a": 1}}, "metadata must be texts by name"),
    ]:
        with pytest.raises(ValueError, match=f"write_safetensors: {said}"):
            write_safetensors(path, arrays, **keywords)
    assert not path.exists() and len(STORAGE) == 15
