"""The truth for this family: `minillm`'s dequantisation, then a product."""

import numpy as np

from minillm.autograd import Tensor
from minillm.functional import nf4, quantisation
from minillm.functional.linear import linear


def product(x: Tensor, w: np.ndarray) -> Tensor:
    """x (..., k), w (n, k) -> (..., n)."""
    return linear(x, Tensor(w.astype(x.dtype)))


def int8_linear(x: Tensor, codes: np.ndarray, scale: np.ndarray) -> Tensor:
    """x (..., k), codes (n, k) int8, scale (n, 1) -> (..., n)."""
    return product(x, int8_weights(codes, scale))


def nf4_linear(x: Tensor, packed: np.ndarray, scale: np.ndarray, n_out: int, block: int) -> Tensor:
    """x (..., k), packed (ceil(n k / 2),) uint8, scale (blocks,) -> (..., n)."""
    return product(x, nf4_weights(packed, scale, n_out, x.shape[-1], block))


def nf4_double_linear(
    x: Tensor, packed: np.ndarray, scale: np.ndarray, meta: np.ndarray, mean: float, n_out: int, block: int
) -> Tensor:
    """As `nf4_linear`, scale (meta blocks, 256) int8 and meta (meta blocks, 1)."""
    return product(x, nf4_double_weights(packed, scale, meta, mean, n_out, x.shape[-1], block))


def int8_weights(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """W (n, k)."""
    return quantisation.dequantise(quantisation.Quantised(codes, scale.astype(np.float32)))


def nf4_weights(packed: np.ndarray, scale: np.ndarray, n: int, k: int, block: int) -> np.ndarray:
    """W (n, k)."""
    return nf4.dequantise_nf4(nf4.NF4(packed, scale.astype(np.float32), (n, k), block))


def nf4_double_weights(
    packed: np.ndarray, scale: np.ndarray, meta: np.ndarray, mean: float, n: int, k: int, block: int
) -> np.ndarray:
    """W (n, k)."""
    coarse = quantisation.Quantised(scale, meta.astype(np.float32))
    single = nf4.dequantise_scales(nf4.QuantisedScales(coarse, mean, -(-n * k // block)))
    return nf4_weights(packed, single, n, k, block)
