"""Small GGUF files, written byte by byte from the format's description (and not by the library we compare with)."""

import struct

import numpy as np

CODES = {bool: 7, int: 11, float: 12, str: 8, list: 9}


def text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def plain(value) -> bytes:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list):
        kind = CODES[type(value[0])] if value else 4
        return struct.pack("<IQ", kind, len(value)) + b"".join(map(plain, value))
    return struct.pack({bool: "<?", int: "<q", float: "<d"}[type(value)], value)


def gguf_bytes(entries: dict, tensors: dict, *, version: int = 3, alignment: int = 32) -> bytes:
    """The file's bytes; tensors: name -> (shape in NumPy's order, code of the kind, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    for name, value in entries.items():
        head += text(name) + struct.pack("<I", CODES[type(value)]) + plain(value)
    body = b""
    for name, (shape, code, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), code, len(body))
        body += data + bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + body


def small_file(rng: np.random.Generator) -> bytes:
    """A file with an entry of every type and a tensor of several kinds."""
    entries = {
        "general.architecture": "llama",
        "a.number": -7,
        "a.fraction": 0.25,
        "a.flag": True,
        "texts": ["eins", "zwei", "drei ✓"],
        "numbers": [1, 2, 3],
        "flags": [True, False],
        "nested": [["a", "b"], ["c"]],
        "nothing": [],
    }
    tensors = {
        "plain": ((2, 3), 0, rng.normal(size=(2, 3)).astype("<f4").tobytes()),
        "half": ((4,), 1, rng.normal(size=4).astype("<f2").tobytes()),
        "q8": ((2, 64), 8, rng.bytes(4 * 34)),
        "q4": ((3, 32), 3, rng.bytes(3 * 20)),
    }
    return gguf_bytes(entries, tensors)
