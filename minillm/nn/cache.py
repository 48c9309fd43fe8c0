r"""The key/value cache of incremental decoding."""

from typing import Any

import numpy as np

from minillm.checks import require, require_positive


class KVCache:
    r"""Rotated keys and values of the positions seen so far, for all layers.

    Equation: `kv-cache` append $k_t,v_t$; attend $q_t$ over $1..t$
    Equation: `kv-cache-size` $2N_{\rm layer}BLH_{kv}d_{\rm head}$ elements
    Shapes: keys and values (N_layer, B, H_kv, L_max, d_head)
    Raises: ValueError when more positions are appended than there is room for.
    Source: notes §4.2, §4.3.
    Differs: all cached positions stay usable while the context grows (erratum 43).
    """

    def __init__(self, n_layers: int, batch: int, n_kv_heads: int, capacity: int, d_head: int, dtype: Any = np.float32):
        for name, value in (("batch", batch), ("capacity", capacity)):
            require_positive(value, "KVCache", name, integer=True)
        shape = (n_layers, batch, n_kv_heads, capacity, d_head)
        self.keys, self.values = np.empty(shape, dtype), np.empty(shape, dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """How many positions there is room for."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, n_new: int) -> np.ndarray:
        """The positions of the next ``n_new`` tokens, or an error if they do not fit."""
        require(
            self.length + n_new <= self.capacity,
            "KVCache",
            "the context",
            f"at most {self.capacity} tokens long",
            f"{self.length} cached and {n_new} new ones",
            "Make the cache larger, or the text shorter.",
        )
        return np.arange(self.length, self.length + n_new)

    def write(self, layer: int, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store the new keys and values of one layer; return views of all up to and including them."""
        stop = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : stop] = keys
        self.values[layer, :, :, self.length : stop] = values
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, n_new: int) -> None:
        """Count ``n_new`` positions as seen, after every layer has written them."""
        self.length += n_new

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
