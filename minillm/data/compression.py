"""General-purpose compressors as opponents of a language model, in the same unit."""

import bz2
import gzip
import lzma
from collections.abc import Callable

from minillm.checks import require, require_one_of

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9, mtime=0),
    "bzip2": lambda data: bz2.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=9),
}


def compressed_bits_per_byte(data: bytes, method: str, primed_with: bytes = b"") -> float:
    """Bits that a compressor at its strongest setting spends on a byte of ``data``.

    With ``primed_with`` (the training part, say) only what ``data`` adds behind it is counted; gzip looks back
    32 KiB and bzip2 900 kB, so only xz makes full use of a long text.

    Raises: ValueError for an unknown method or empty data.
    """
    where = "compressed_bits_per_byte"
    require_one_of(method, COMPRESSORS, where, "method")
    require(len(data) > 0, where, "data", "at least one byte", "none")
    compress = COMPRESSORS[method]
    without = len(compress(primed_with)) if primed_with else 0
    return 8 * (len(compress(primed_with + data)) - without) / len(data)
