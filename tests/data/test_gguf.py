"""GGUF files: what is in them comes back, and whatever else they are, one clear error does."""

import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from minillm.data.gguf import KINDS, parse_gguf, read_gguf
from tests.oracles.gguf_files import gguf_bytes, small_file


def reading(folder, data: bytes):
    path = folder / "file.gguf"
    path.write_bytes(data)
    return read_gguf(path)


def test_entries_and_tensors_come_back(tmp_path):
    rng = np.random.default_rng(0)
    expected = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    file = reading(tmp_path, small_file(rng))
    found = file.metadata
    assert [found[f"a.{name}"] for name in ("number", "fraction", "flag")] == [-7, 0.25, True]
    assert found["texts"] == ["eins", "zwei", "drei ✓"] and found["nested"] == [["a", "b"], ["c"]]
    assert found["numbers"].tolist() == [1, 2, 3] and found["flags"].tolist() == [True, False]
    assert len(found["nothing"]) == 0
    assert list(file.tensors) == ["plain", "half", "q8", "q4"]
    tensor = file.tensors["plain"]
    assert tensor.shape == (2, 3) and tensor.kind.name == "F32"
    np.testing.assert_array_equal(tensor.blocks.view("<f4").reshape(2, 3), expected)
    assert [file.tensors[name].blocks.shape for name in ("q8", "q4")] == [(4, 34), (3, 20)]


def test_the_kinds_are_those_of_the_reference_library():
    constants = pytest.importorskip("gguf.constants")
    for code, kind in KINDS.items():
        assert constants.GGMLQuantizationType(code).name == kind.name
        assert constants.GGML_QUANT_SIZES[code] == (kind.numbers, kind.nbytes)


def test_a_file_that_the_reference_library_wrote(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "theirs.gguf"
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(3, 64)).astype(np.float32)
    packed = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_array("a.list", ["x", "yy", ""])
    writer.add_custom_alignment(64)
    writer.add_tensor("m", matrix)
    writer.add_tensor("p", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.metadata["a.count"] == 7 and file.metadata["a.list"] == ["x", "yy", ""]
    np.testing.assert_array_equal(file.tensors["m"].blocks.view("<f4").reshape(3, 64), matrix)
    assert file.tensors["p"].shape == (3, 64)
    np.testing.assert_array_equal(file.tensors["p"].blocks.reshape(packed.shape), packed)


ONE = ((2, 32), 8, bytes(2 * 34))
HUGE = (1 << 62, 1 << 62)
WRONG = {
    "nothing": (b"", "must be a GGUF file, got an empty one"),
    "two bytes": (b"GG", "first four bytes"),
    "another magic": (b"GGML" + bytes(40), "first four bytes .* must be GGUF, got b'GGML'"),
    "an old version": (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version .* must be 2 or 3, got 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "a big-endian file"),
    "more entries than bytes": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(40), "the number of entries"),
    "more tensors than bytes": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(40), "the number of tensors"),
    "half of one": (small_file(np.random.default_rng(0))[:150], "Is the file complete"),
    "without its end": (small_file(np.random.default_rng(0))[:-40], "the place of q4"),
    "a shape that wraps around": (gguf_bytes({}, {"m": (HUGE, 0, bytes(64))}), "the place of m"),
    "a row that is no whole block": (gguf_bytes({}, {"m": ((2, 31), 8, bytes(68))}), "whole blocks of 32"),
    "a size of zero": (gguf_bytes({}, {"m": ((0, 32), 8, bytes(64))}), "the sizes of m"),
    "no dimension": (gguf_bytes({}, {"m": ((), 0, bytes(64))}), "number of dimensions of m .* must be 1 to 4"),
    "five dimensions": (gguf_bytes({}, {"m": ((1,) * 5, 0, bytes(64))}), "number of dimensions"),
    "an unknown kind": (gguf_bytes({}, {"m": ((2, 32), 99, bytes(64))}), "the kind of m .* got 99"),
    "an alignment of 3": (gguf_bytes({"general.alignment": 3}, {"m": ONE}), "alignment .* power of two"),
    "an alignment in words": (gguf_bytes({"general.alignment": "32"}, {"m": ONE}), "alignment"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_gives_one_clear_error(tmp_path, case):
    data, words = WRONG[case]
    with pytest.raises(ValueError, match=rf"read_gguf: .*{words}"):
        reading(tmp_path, data)


def test_names_twice_and_tensors_that_overlap_are_refused(tmp_path):
    data = gguf_bytes({"first": 1, "other": 2}, {"m1": ONE, "m2": ONE})
    with pytest.raises(ValueError, match="'first' twice"):
        reading(tmp_path, data.replace(b"other", b"first"))
    with pytest.raises(ValueError, match="'m1' twice"):
        reading(tmp_path, data.replace(b"m2", b"m1"))
    place = data.index(b"m2") + 2 + 4 + 16 + 4
    assert data[place : place + 8] == struct.pack("<Q", 96)
    with pytest.raises(ValueError, match=r"the place of m2 .* behind the one before"):
        reading(tmp_path, data[:place] + struct.pack("<Q", 64) + data[place + 8 :])


def test_texts_that_are_not_utf8_and_deep_arrays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="valid UTF-8"):
        reading(tmp_path, gguf_bytes({"word": "abcd"}, {}).replace(b"abcd", b"ab\xff\xfe"))
    deep: list = ["x"]
    for _ in range(6):
        deep = [deep]
    with pytest.raises(ValueError, match="at most 4 deep"):
        reading(tmp_path, gguf_bytes({"deep": deep}, {}))


def test_a_missing_file_a_folder_and_a_missing_entry_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match="got a folder"):
        read_gguf(tmp_path)
    file = reading(tmp_path, gguf_bytes({"n": 3, "yes": True}, {}))
    assert file.field("n", int) == 3 and file.field("m", int, 5) == 5
    for name, kind in (("n", str), ("m", int), ("yes", int)):
        with pytest.raises(ValueError, match=f"the entry {name}"):
            file.field(name, kind)


INTERESTING = [0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with one to four faults: flipped bytes, an extreme number, a piece cut out or repeated, an early end."""
    faulty = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(len(faulty))) if len(faulty) else 0
        kind = rng.integers(5)
        if kind == 0:
            faulty[place : place + 1] = rng.bytes(1)
        elif kind == 1:
            faulty[place : place + 8] = struct.pack("<Q", INTERESTING[rng.integers(len(INTERESTING))])
        elif kind == 2:
            del faulty[place : place + int(rng.integers(1, 40))]
        elif kind == 3:
            faulty[place:place] = faulty[place : place + int(rng.integers(1, 40))]
        else:
            del faulty[place:]
    return bytes(faulty)


def fuzz(n: int, seed: int) -> tuple[int, int]:
    """Read n mutated files; how many were refused, and how many were still readable."""
    rng = np.random.default_rng(seed)
    original = small_file(rng)
    refused = 0
    tracemalloc.start()
    for _ in range(n):
        data = mutated(original, rng)
        try:
            file = parse_gguf(data, Path("fuzzed.gguf"))
        except ValueError as error:
            refused += 1
            assert str(error).startswith("read_gguf: ") and "\n" not in str(error)
        else:
            for tensor in file.tensors.values():
                assert tensor.blocks.nbytes <= len(data)
                tensor.blocks.sum()  # every byte is really there
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20, f"{peak} bytes for a file of {len(original)}"
    return refused, n - refused


def test_300_mutated_files_give_an_error_or_a_file():
    refused, readable = fuzz(300, seed=0)
    assert refused > 100 and readable > 10  # the mutations are neither harmless nor all of one kind


@pytest.mark.slow
def test_10_000_mutated_files_give_an_error_or_a_file():
    """In a process of its own: a crash or a hang would be seen, and calls are not slowed down by checked annotations."""
    code = "from tests.data.test_gguf import fuzz; print(*fuzz(10_000, seed=1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    refused, readable = map(int, done.stdout.split())
    print(f"{refused} refused, {readable} readable")
    assert refused > 3000 and readable > 300
