r"""Safetensors files, bfloat16 and FP8 included, mapped into memory.

    8 bytes: n | n bytes of JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, ...} | the tensors' bytes

Nothing in the header is believed before it was compared with the size of the file, and every byte behind the header
has to belong to exactly one tensor. So a damaged or hostile file ends in one ValueError, and the memory that it can
ask for is in proportion to its own size.
"""

import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm.checks import message, require, require_one_of
from minillm.data.files import write_atomically
from minillm.data.float_formats import decode_float, encode_float

LARGEST_HEADER = 100_000_000  # bytes; what the format's own reader allows
MOST_DIMENSIONS, MOST_NUMBERS = 32, 1 << 48
PLAIN = {
    "U8": "<u1",
    "I8": "<i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
CODED = {"BF16": ("bf16", "<u2"), "F8_E4M3": ("fp8_e4m3", "<u1"), "F8_E5M2": ("fp8_e5m2", "<u1")}
STORAGE = {**PLAIN, **{name: storage for name, (_, storage) in CODED.items()}, "BOOL": "<u1"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: np.ndarray  # uint8, a view of the file

    def codes(self) -> np.ndarray:
        """The stored integers or numbers, a read-only view of the file."""
        return self.raw.view(STORAGE[self.dtype]).reshape(self.shape)

    def numpy(self) -> np.ndarray:
        """The numbers: a view of the file where NumPy has the type, float32 for bfloat16 and FP8."""
        if self.dtype == "BOOL":
            return self.codes() != 0
        if self.dtype in CODED:
            codes = self.codes()
            return decode_float(codes.astype(codes.dtype.newbyteorder("=")), CODED[self.dtype][0])
        return self.codes()


@dataclass(frozen=True)
class SafetensorsFile:
    """What a file holds: tensors by name, and texts about them."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]

    def numpy(self) -> dict[str, np.ndarray]:
        """All tensors as arrays."""
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


def _wrong(path: Path, what: str, wanted: str, received: Any) -> ValueError:
    received = received if isinstance(received, str) else repr(received)
    received = received if len(received) <= 120 else received[:117] + "..."
    return ValueError(message("read_safetensors", f"{what} in {path}", wanted, received, "Is the file complete?"))


def read_safetensors(path: str | os.PathLike) -> SafetensorsFile:
    r"""Map a safetensors file.

    Equation: `bf16` stored as 16 bits, read as float32
    Equation: `fp8-e4m3` stored as 8 bits, read as float32
    Equation: `fp8-e5m2` stored as 8 bits, read as float32
    Raises: FileNotFoundError if there is no file, ValueError for anything but a complete and consistent one: a header
        that is too long or no JSON, an unknown dtype, shapes and offsets that disagree, gaps, overlaps, a name twice.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"read_safetensors: there is no file {path}.")
    if not path.is_file():
        raise ValueError(message("read_safetensors", str(path), "a file", "a folder or a device"))
    if path.stat().st_size == 0:  # which cannot be mapped
        return parse_safetensors(path, b"")
    with open(path, "rb") as file:
        return parse_safetensors(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def parse_safetensors(path: Path, mapped: mmap.mmap | bytes) -> SafetensorsFile:
    """What the bytes of a file say; the path is for the messages.

    Raises: ValueError as `read_safetensors` does.
    """
    if len(mapped) < 8:
        raise _wrong(path, "the length of the header", "8 bytes", f"a file of {len(mapped)}")
    (length,) = struct.unpack("<Q", mapped[:8])
    room = min(len(mapped) - 8, LARGEST_HEADER)
    if not 2 <= length <= room:
        raise _wrong(path, "the length of the header", f"from 2 to {room} bytes", length)
    header = _parse(path, mapped[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts:
        raise _wrong(path, "__metadata__", "texts by name", metadata)
    buffer = np.frombuffer(mapped, np.uint8)[8 + length :]
    return SafetensorsFile(path, metadata, _locate(path, header, buffer))


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # of the decoding, the JSON, and a number of too many digits
        raise _wrong(path, "the header", "JSON in UTF-8 that names everything once", str(error)) from error
    if not isinstance(header, dict):
        raise _wrong(path, "the header", "a JSON object", f"a {type(header).__name__}")
    return header


def _describe(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, begin and end of a tensor, each sound in itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _wrong(path, f"the entry {name!r}", "an object of dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise _wrong(path, f"the dtype of {name!r}", "one of " + ", ".join(STORAGE), dtype)
    sizes = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
    numbers = 1
    for n in shape if sizes else []:  # Python's integers: a product of hostile sizes does not wrap around
        numbers *= max(n, 1)
        sizes = sizes and numbers <= MOST_NUMBERS
        if not sizes:
            break
    if not sizes:
        raise _wrong(path, f"the shape of {name!r}", "a list of at most 32 sizes that memory could hold", shape)
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)
    nbytes = (0 if 0 in shape else numbers) * np.dtype(STORAGE[dtype]).itemsize
    if not pair or offsets[1] - offsets[0] != nbytes:
        raise _wrong(path, f"the offsets of {name!r}", f"two, {nbytes} bytes apart", offsets)
    return dtype, tuple(shape), offsets[0], offsets[1]


def _locate(path: Path, header: dict[str, Any], buffer: np.ndarray) -> dict[str, StoredTensor]:
    described = {name: _describe(path, name, entry) for name, entry in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(described.items(), key=lambda item: item[1][2:]):
        if begin != at or end > len(buffer):
            wanted = f"from {at}, behind the one before, within {len(buffer)} bytes"
            raise _wrong(path, f"the place of {name!r}", wanted, f"{begin} to {end}")
        at = end
    if at != len(buffer):
        raise _wrong(path, "the tensors' bytes", f"{at}, as the header says", len(buffer))
    return {name: StoredTensor(name, dtype, shape, buffer[i:j]) for name, (dtype, shape, i, j) in described.items()}


def _stored(name: str, array: np.ndarray, dtype: str | None) -> tuple[str, bytes]:
    """The type and bytes of an array, encoded if a type that NumPy lacks is asked for."""
    if dtype is not None:
        require_one_of(dtype, STORAGE, "write_safetensors", f"the dtype of {name!r}")
    if dtype in CODED:
        codes = encode_float(array, CODED[dtype][0])
        return dtype, codes.astype(CODED[dtype][1]).tobytes()
    own = {np.dtype(storage): found for found, storage in PLAIN.items()} | {np.dtype(bool): "BOOL"}
    found = own.get(array.dtype.newbyteorder("<") if array.dtype.kind != "b" else array.dtype)
    wanted = "of a type that safetensors has" if dtype is None else f"stored as it is or in {', '.join(CODED)}"
    require(found is not None and dtype in (None, found), "write_safetensors", f"{name!r}", wanted, array)
    assert found is not None
    return found, array.astype(array.dtype.newbyteorder("<")).tobytes()


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    *,
    dtypes: str | Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    r"""Write arrays as a safetensors file, atomically; `dtypes` rounds floats to BF16, F8_E4M3 or F8_E5M2.

    Equation: `bf16` rounded to nearest even
    Shapes: dtypes: one for every tensor of floats, or by name; the others stay what they are
    Raises: ValueError for a type that the format does not have, a name that no tensor has, or metadata that are not
        texts.
    """
    where = "write_safetensors"
    require("__metadata__" not in tensors, where, "the names", "other than __metadata__", "that one")
    texts = all(isinstance(k, str) and isinstance(v, str) for k, v in (metadata or {}).items())
    require(texts, where, "metadata", "texts by name", "something else")
    if isinstance(dtypes, str):
        dtypes = {name: dtypes for name, array in tensors.items() if array.dtype.kind == "f"}
    unknown = set(dtypes or {}) - set(tensors)
    require(not unknown, where, "dtypes", "for tensors that are there", str(sorted(unknown)[:3]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, at = [], 0
    for name in sorted(tensors):
        dtype, raw = _stored(name, np.asarray(tensors[name]), (dtypes or {}).get(name))
        offsets = [at, at + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(np.shape(tensors[name])), "data_offsets": offsets}
        parts.append(raw)
        at += len(raw)
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    write_atomically(path, struct.pack("<Q", len(text)) + text + b"".join(parts))
