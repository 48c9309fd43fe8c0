r"""Four bits whose levels are quantiles of a normal distribution, in blocks with a scale each; and scales quantised too."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri

from minillm.checks import require, require_positive
from minillm.functional.quantisation import SMALLEST_SCALE, Quantised, quantise_int8

BLOCK, META_BLOCK = 64, 256
OUTERMOST = (31 / 32 + 29 / 30) / 2  # of the probabilities: between those of 16 and of 15 equal parts


class NF4(NamedTuple):
    """Two codes to a byte, the first in the high half; a scale for each block; the shape of what they stand for."""

    packed: np.ndarray  # (n / 2,) uint8
    scale: np.ndarray  # (blocks,) float32
    shape: tuple[int, ...]
    block: int = BLOCK


class QuantisedScales(NamedTuple):
    """Scales as signed bytes in blocks of 256, and the mean that was taken off before."""

    quantised: Quantised  # codes (blocks, 256), scale (blocks, 1)
    mean: float
    n: int


@functools.cache
def nf4_levels() -> Float[np.ndarray, " 16"]:
    r"""The sixteen levels, rising from -1 to 1 with an exact 0.

    Equation: `nf4-levels` quantiles of the standard normal at 8 probabilities above and 7 below one half, and 0, over the largest
    Shapes: -> (16,) float32
    Source: notes §10.4 footnote 12; Dettmers et al. 2023.
    Differs: nothing is learned, they are fixed quantiles (erratum 56).
    """
    above = ndtri(np.linspace(OUTERMOST, 0.5, 9)[:-1])  # (8,) from the largest down
    below = -ndtri(np.linspace(OUTERMOST, 0.5, 8)[:-1])  # (7,) from the smallest up
    levels = (np.concatenate([below, [0.0], above[::-1]]) / above[0]).astype(np.float32)
    levels.flags.writeable = False
    return levels


def quantise_nf4(w: Float[np.ndarray, "*S"], block: int = BLOCK) -> NF4:
    r"""The nearest level to each number over the largest magnitude of its block.

    Equation: `nf4-quant` $\mathbf W_0\approx s_{\rm blk}\,\mathrm{level}[q],\ s_{\rm blk}=\max_{\rm blk}\lvert w\rvert$
    Shapes: w (*S), read row by row -> packed codes and scales; a last block that is short has its own scale
    Raises: ValueError for no numbers, numbers that are not finite, or a block that is not even and positive.
    Source: notes §10.4; Dettmers et al. 2023.
    """
    where = "quantise_nf4"
    require_positive(block, where, "block", integer=True)
    require(block % 2 == 0, where, "block", "even, since two codes share a byte", block)
    require(w.dtype.kind == "f" and w.size > 0, where, "w", "an array of floating-point numbers, at least one", w)
    require(bool(np.isfinite(w).all()), where, "w", "finite", "NaN or infinity among its numbers")
    padded = np.zeros(-(-w.size // block) * block, np.float32)
    padded[: w.size] = w.reshape(-1)
    blocks = padded.reshape(-1, block)
    scale = np.maximum(np.abs(blocks).max(-1), np.float32(SMALLEST_SCALE))  # (blocks,)
    levels = nf4_levels()
    middles = (levels[1:] + levels[:-1]) / 2
    codes = np.searchsorted(middles, blocks / scale[:, None]).astype(np.uint8).reshape(-1)[: w.size + w.size % 2]
    return NF4(codes[::2] << 4 | codes[1::2], scale, w.shape, block)


def dequantise_nf4(quantised: NF4) -> Float[np.ndarray, "*S"]:
    r"""Levels times the scales of their blocks.

    Equation: `nf4-quant` $\hat w=s_{\rm blk}\,\mathrm{level}[q]$
    Shapes: packed (ceil(n / 2),), scale (blocks,) -> (*S) float32
    Raises: ValueError unless codes, scales and shape fit each other.
    Source: notes §10.4.
    """
    packed, scale, shape, block = quantised
    n = int(np.prod(shape, dtype=np.int64))
    fits = packed.shape == (-(-n // 2),) and scale.shape == (-(-n // block),)
    wanted = f"of {-(-n // 2)} bytes and {-(-n // block)} scales for shape {shape}"
    require(fits, "dequantise_nf4", "the parts", wanted, f"{packed.shape} and {scale.shape}")
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[:n]
    return (nf4_levels()[codes] * np.repeat(scale, block)[:n]).reshape(shape)


def quantise_scales(scale: Float[np.ndarray, " n"], block: int = META_BLOCK) -> QuantisedScales:
    r"""The second quantisation: scales without their mean as signed bytes.

    Equation: `double-quant` scales minus their mean in 8 bits, blocks of 256, one float32 scale to a block
    Shapes: scale (n,) -> codes (ceil(n / 256), 256) and scales of scales
    Raises: ValueError unless scale is one row of finite numbers.
    Source: notes §10.4; Dettmers et al. 2023.
    Differs: 8 equally spaced bits; the usual library takes an 8-bit floating code in this place.
    """
    require_positive(block, "quantise_scales", "block", integer=True)
    sound = scale.ndim == 1 and scale.size > 0 and bool(np.isfinite(scale).all())
    require(sound, "quantise_scales", "scale", "one row of finite numbers", scale)
    mean = float(scale.mean(dtype=np.float32))
    padded = np.zeros(-(-scale.size // block) * block, np.float32)
    padded[: scale.size] = scale - np.float32(mean)
    return QuantisedScales(quantise_int8(padded.reshape(-1, block), -1), mean, scale.size)


def dequantise_scales(quantised: QuantisedScales) -> Float[np.ndarray, " n"]:
    r"""The scales back from their bytes.

    Equation: `double-quant` $\hat s=s_{\rm meta}q+\bar s$
    Shapes: codes (blocks, 256) -> (n,) float32
    Raises: ValueError if there are fewer codes than scales.
    Source: notes §10.4.
    """
    (codes, scale), mean, n = quantised
    require(0 <= n <= codes.size, "dequantise_scales", "n", f"at most the {codes.size} codes", n)
    return (codes * scale).reshape(-1)[:n] + np.float32(mean)


def bits_per_weight(block: int = BLOCK, meta_block: int | None = META_BLOCK) -> float:
    r"""What a weight costs in NF4: its code and its part of the scales.

    Equation: `double-quant` $4+\frac8{64}+\frac{32}{64\cdot256}=4.127$; without it $4+\frac{32}{64}=4.5$
    Shapes: -> number; meta_block None means scales in float32
    Raises: ValueError for blocks that are not positive integers.
    Source: notes §10.4.
    Differs: the memory falls by 3.877 and not by 4 (erratum 56).
    """
    require_positive(block, "bits_per_weight", "block", integer=True)
    if meta_block is None:
        return 4 + 32 / block
    require_positive(meta_block, "bits_per_weight", "meta_block", integer=True)
    return 4 + 8 / block + 32 / (block * meta_block)
