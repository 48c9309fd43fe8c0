r"""GGUF files: metadata, and tensors as the file has them, compressed blocks included.

    magic "GGUF" | version | number of tensors | number of entries
    entries: name, type, value                      (`general.architecture`, the vocabulary, the chat template, ...)
    tensors: name, sizes (innermost first), kind, offset
    padding | the tensors' bytes, each at a multiple of the alignment

The file is mapped, not read, and nothing in it is believed before it has been compared with the size of the file:
every length, count and offset. So the memory that a hostile file can ask for is in proportion to its own size.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minillm.checks import message

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
MOST_DIMENSIONS, DEEPEST_ARRAY, LONGEST_NAME = 4, 4, 1 << 12
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class Kind(NamedTuple):
    """How numbers of a kind are stored: so many to a block, so many bytes each block."""

    name: str
    numbers: int
    nbytes: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    15: Kind("Q8_K", 256, 292),
    24: Kind("I8", 1, 1),
    25: Kind("I16", 1, 2),
    26: Kind("I32", 1, 4),
    27: Kind("I64", 1, 8),
    28: Kind("F64", 1, 8),
    30: Kind("BF16", 1, 2),
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its shape in NumPy's order, and its blocks (rows, bytes) as they lie in the file."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    blocks: np.ndarray  # uint8 (number of blocks, bytes of a block), a view of the file


@dataclass(frozen=True)
class GGUF:
    """What a file holds."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def field(self, name: str, kind: type, default: Any = None) -> Any:
        """One entry of the metadata, of a certain type; an error if it is neither there nor has a default."""
        value = self.metadata.get(name, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            received = "none" if name not in self.metadata else value
            raise ValueError(message("GGUF.field", f"the entry {name} of {self.path}", f"a {kind.__name__}", received))
        return value


def read_gguf(path: str | os.PathLike) -> GGUF:
    """Map a GGUF file, versions 2 and 3, little-endian.

    Raises: FileNotFoundError if there is no file, ValueError for anything that is not a complete and consistent one:
        wrong magic or version, a length, count or offset that points outside, a name twice, tensors that overlap.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"read_gguf: there is no file {path}.")
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(
            message("read_gguf", str(path), "a GGUF file", "an empty one" if path.is_file() else "a folder")
        )
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return parse_gguf(mapped, path)


def parse_gguf(data: mmap.mmap | bytes, path: Path) -> GGUF:
    """What the bytes of a GGUF file hold; ``path`` is for messages."""
    return _Reader(path, data).read()


class _Reader:
    """Walks through the mapped file; `take` is the only place where a position moves."""

    def __init__(self, path: Path, mapped: mmap.mmap | bytes):
        self.path, self.mapped, self.size, self.at = path, mapped, len(mapped), 0

    def wrong(self, what: str, wanted: str, received: Any) -> ValueError:
        what = "".join(c if c.isprintable() else "?" for c in what[:80])  # names come from the file
        return ValueError(message("read_gguf", f"{what} in {self.path}", wanted, received, "Is the file complete?"))

    # -- pieces ----------------------------------------------------------------------------------------------

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise self.wrong(what, f"within the file's {self.size} bytes", f"{n} bytes from {self.at}")
        self.at += n
        return self.mapped[self.at - n : self.at]

    def number(self, code: str, what: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """A number of things of which each takes at least so many bytes of what is left."""
        n, left = self.number("<Q", what), self.size - self.at
        if n * smallest > left:
            raise self.wrong(what, f"so many that they fit into the remaining {left} bytes", n)
        return n

    def text(self, what: str, longest: int | None = None) -> str:
        n = self.count(1, f"the length of {what}")
        if longest is not None and n > longest:
            raise self.wrong(f"the length of {what}", f"at most {longest}", n)
        try:
            return self.take(n, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(what, "valid UTF-8", str(error)) from error

    def value(self, kind: int, name: str, depth: int = 0) -> Any:
        """One value: a number, a text, or an array (a list of texts or arrays; NumPy for numbers)."""
        if kind == STRING:
            return self.text(f"the text {name}")
        if kind == ARRAY:
            return self.array(name, depth)
        if kind not in NUMBERS:
            raise self.wrong(f"the type of {name}", "0 to 12", kind)
        dtype = np.dtype(NUMBERS[kind])
        value = np.frombuffer(self.take(dtype.itemsize, name), dtype)[0].item()
        return bool(value) if kind == BOOL else value

    def array(self, name: str, depth: int) -> Any:
        if depth == DEEPEST_ARRAY:
            raise self.wrong(f"the arrays in {name}", f"at most {DEEPEST_ARRAY} deep", "deeper ones")
        kind = self.number("<I", f"the type of {name}")
        if kind in NUMBERS:
            dtype = np.dtype(NUMBERS[kind])
            n = self.count(dtype.itemsize, f"the length of {name}")
            array = np.frombuffer(self.take(n * dtype.itemsize, name), dtype)
            return array != 0 if kind == BOOL else array
        n = self.count(8 if kind == STRING else 12, f"the length of {name}")  # a length, and for arrays a type
        return [self.value(kind, name, depth + 1) for _ in range(n)]

    # -- the whole -------------------------------------------------------------------------------------------

    def read(self) -> GGUF:
        if self.take(min(4, self.size), "the magic") != MAGIC:
            raise self.wrong("the first four bytes", "GGUF", repr(self.mapped[:4]))
        version = self.number("<I", "the version")
        if version not in VERSIONS:
            note = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise self.wrong("the version", "2 or 3", f"{version}{note}")
        n_tensors = self.count(24, "the number of tensors")  # name's length, dimensions, kind, offset
        n_entries = self.count(13, "the number of entries")  # name's length, type, a byte
        metadata: dict[str, Any] = {}
        for _ in range(n_entries):
            name = self.text("a name", LONGEST_NAME)
            if name in metadata:
                raise self.wrong("every name", "there once", f"{name!r} twice")
            metadata[name] = self.value(self.number("<I", f"the type of {name}"), name)
        described = [self.description() for _ in range(n_tensors)]
        return GGUF(self.path, metadata, self.locate(described, metadata))

    def description(self) -> tuple[str, tuple[int, ...], Kind, int]:
        """Name, shape, kind and offset of one tensor."""
        name = self.text("a name", LONGEST_NAME)
        n = self.number("<I", f"the number of dimensions of {name}")
        if not 1 <= n <= MOST_DIMENSIONS:
            raise self.wrong(f"the number of dimensions of {name}", f"1 to {MOST_DIMENSIONS}", n)
        sizes = [self.number("<Q", f"a dimension of {name}") for _ in range(n)]
        code = self.number("<I", f"the kind of {name}")
        if code not in KINDS:
            raise self.wrong(f"the kind of {name}", "one of " + ", ".join(k.name for k in KINDS.values()), code)
        kind = KINDS[code]
        if min(sizes) < 1 or sizes[0] % kind.numbers:
            raise self.wrong(f"the sizes of {name}", f"positive, whole blocks of {kind.numbers} in a row", sizes)
        return name, tuple(reversed(sizes)), kind, self.number("<Q", f"the offset of {name}")

    def locate(self, described: list, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
        """The tensors as views of the file, checked to lie inside, aligned and apart from each other."""
        alignment = metadata.get("general.alignment", ALIGNMENT)
        sound = type(alignment) is int and 8 <= alignment <= 1 << 20 and alignment & (alignment - 1) == 0
        if not sound:
            raise self.wrong("the alignment", "a power of two from 8 to 2^20", alignment)
        start, end = -(-self.at // alignment) * alignment, 0
        whole = np.frombuffer(self.mapped, np.uint8)
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in sorted(described, key=lambda found: found[3]):
            numbers = 1
            for size in shape:  # Python's integers: a product of hostile sizes does not wrap around
                numbers *= size
            nbytes = numbers // kind.numbers * kind.nbytes
            if name in tensors:
                raise self.wrong("every tensor", "there once", f"{name!r} twice")
            if offset % alignment or offset < end or nbytes > self.size - start - offset:
                wanted = f"a multiple of {alignment}, behind the one before and within the file's {self.size} bytes"
                raise self.wrong(f"the place of {name}", wanted, f"{nbytes} bytes from {start} + {offset}")
            end = offset + nbytes
            view = whole[start + offset : start + end].reshape(-1, kind.nbytes)
            tensors[name] = GGUFTensor(name, shape, kind, view)
        return {name: tensors[name] for name, *_ in described}
