r"""The blocks of quantised model files, taken back to float32: a few numbers share a scale that lies beside them.

Every function takes bytes with whole blocks along the last axis and gives the numbers in their place. In Q4_0, Q4_1
and Q8_0 a block has 32 numbers and scales in float16; in Q4_K and Q6_K it has 256, in groups whose scales are
themselves quantised (to 6 and 8 bits) and share one float16 scale of their own.

    Q4_0   d (2 bytes) | 16 bytes: number i in the low half of byte i, number i + 16 in the high half
    Q4_1   d, low (4) | the same 16
    Q8_0   d (2) | 32 signed bytes
    Q4_K   d, d_low (4) | 12 bytes: 8 scales and 8 lows of 6 bits | 128 bytes
    Q6_K   128 bytes of low halves | 64 bytes of two high bits each | 16 signed scales | d (2)
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from minillm.checks import require, require_one_of

Bytes = UInt8[np.ndarray, "*B n"]
Numbers = Float[np.ndarray, "*B m"]


def _blocks(where: str, raw: np.ndarray, nbytes: int) -> np.ndarray:
    sound = isinstance(raw, np.ndarray) and raw.dtype == np.uint8 and raw.ndim >= 1 and raw.shape[-1] % nbytes == 0
    require(sound, where, "the blocks", f"a uint8 array with a multiple of {nbytes} bytes along the last axis", raw)
    return np.ascontiguousarray(raw).reshape(*raw.shape[:-1], -1, nbytes)  # (..., blocks, nbytes)


def _float16(two_bytes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(two_bytes).view("<f2").astype(np.float32)


def _halves(packed: np.ndarray) -> np.ndarray:
    """All low halves of the bytes along the last axis, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _rows(numbers: np.ndarray, dims: int) -> np.ndarray:
    """Blocks, one after the other, along the last of `dims` axes."""
    rows = (
        numbers.reshape(*numbers.shape[: dims - 1], -1)
        if numbers.size
        else numbers.reshape(*numbers.shape[: dims - 1], 0)
    )
    return rows.astype(np.float32, copy=False)


def dequantise_q4_0(raw: Bytes) -> Numbers:
    r"""Sixteen levels from -8 to 7 times a scale.

    Equation: `scale-granularity` $\hat x=s_{\rm blk}(q-8)$
    Shapes: raw (..., 18 n) uint8 -> (..., 32 n) float32
    Raises: ValueError unless raw is whole blocks in uint8.
    Source: notes §7; the GGUF format.
    """
    blocks = _blocks("dequantise_q4_0", raw, 18)
    levels = _halves(blocks[..., 2:]).astype(np.int8) - np.int8(8)  # (..., blocks, 32)
    return _rows(_float16(blocks[..., :2]) * levels, raw.ndim)


def dequantise_q4_1(raw: Bytes) -> Numbers:
    r"""Sixteen levels upwards from the block's smallest number.

    Equation: `scale-granularity` $\hat x=s_{\rm blk}q+l_{\rm blk}$
    Shapes: raw (..., 20 n) uint8 -> (..., 32 n) float32
    Raises: ValueError unless raw is whole blocks in uint8.
    Source: notes §7; the GGUF format.
    """
    blocks = _blocks("dequantise_q4_1", raw, 20)
    scale, low = _float16(blocks[..., :2]), _float16(blocks[..., 2:4])  # (..., blocks, 1)
    return _rows(scale * _halves(blocks[..., 4:]) + low, raw.ndim)


def dequantise_q8_0(raw: Bytes) -> Numbers:
    r"""Signed bytes times a scale.

    Equation: `scale-granularity` $\hat x=s_{\rm blk}q$
    Shapes: raw (..., 34 n) uint8 -> (..., 32 n) float32
    Raises: ValueError unless raw is whole blocks in uint8.
    Source: notes §7; the GGUF format.
    """
    blocks = _blocks("dequantise_q8_0", raw, 34)
    return _rows(_float16(blocks[..., :2]) * blocks[..., 2:].view(np.int8), raw.ndim)


def dequantise_q4_k(raw: Bytes) -> Numbers:
    r"""Eight groups of 32 numbers, each with a scale and a low end of 6 bits.

    Equation: `double-quant` $\hat x=(d\,a_g)q-d_{\rm low}b_g$, the scales of the groups quantised in their turn
    Shapes: raw (..., 144 n) uint8 -> (..., 256 n) float32
    Raises: ValueError unless raw is whole blocks in uint8.
    Source: notes §10.4; the GGUF format.
    """
    blocks = _blocks("dequantise_q4_k", raw, 144)
    low6, high6, mixed = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    # The first four scales and lows lie in the low 6 bits; the other four have their low halves in `mixed` and their
    # upper two bits on top of the first four.
    a = np.concatenate([low6 & 63, (mixed & 15) | (low6 >> 2 & 48)], axis=-1)  # (..., blocks, 8)
    b = np.concatenate([high6 & 63, (mixed >> 4) | (high6 >> 2 & 48)], axis=-1)
    scale, low = _float16(blocks[..., :2]) * a, _float16(blocks[..., 2:4]) * b  # (..., blocks, 8)
    pairs = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)  # two groups to 32 bytes
    q = np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(*blocks.shape[:-1], 8, 32)
    return _rows(scale[..., None] * q - low[..., None], raw.ndim)


def dequantise_q6_k(raw: Bytes) -> Numbers:
    r"""Sixteen groups of 16 numbers of 6 bits, each with a signed scale of 8 bits.

    Equation: `double-quant` $\hat x=(d\,a_g)(q-32)$, the scales of the groups quantised in their turn
    Shapes: raw (..., 210 n) uint8 -> (..., 256 n) float32
    Raises: ValueError unless raw is whole blocks in uint8.
    Source: notes §10.4; the GGUF format.
    """
    blocks = _blocks("dequantise_q6_k", raw, 210)
    head = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*head, 2, 64)  # each half of the block: 64 bytes for 128 numbers
    low = _halves(low).reshape(*head, 2, 4, 32)
    high = blocks[..., 128:192].reshape(*head, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | high << 4).astype(np.int8) - np.int8(32)
    scale = _float16(blocks[..., 208:]) * blocks[..., 192:208].view(np.int8)  # (..., blocks, 16)
    return _rows(scale[..., None] * q.reshape(*head, 16, 16), raw.ndim)


DEQUANTISE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": dequantise_q4_0,
    "Q4_1": dequantise_q4_1,
    "Q8_0": dequantise_q8_0,
    "Q4_K": dequantise_q4_k,
    "Q6_K": dequantise_q6_k,
}


def dequantise_blocks(raw: Bytes, kind: str) -> Numbers:
    """The numbers of blocks of a kind, by its name in the file.

    Shapes: raw (..., whole blocks in bytes) -> (..., numbers) float32
    Raises: ValueError for an unknown kind or bytes that are not whole blocks.
    """
    require_one_of(kind, DEQUANTISE, "dequantise_blocks", "kind")
    return DEQUANTISE[kind](raw)
