r"""Caches of incremental decoding: what a layer keeps of the positions it has seen.

The protocol of one layer's cache (``LayerCache`` here; ring, state, latent and quantised ones in their own files):

* ``length``: positions seen so far; ``batch``: sequences; ``capacity``: room, or None if it does not end;
* ``append(k, v) -> (k_all, v_all)``: take the new positions in, count them, return what a query may look at.
  Tensors come back as tensors, arrays as arrays. No gradient passes through a cache;
* ``key_positions``: absolute positions (S,) of what the last ``append`` returned, for masks and biases;
* ``select(rows)``: keep or repeat sequences of the batch, for beams and copies;
* ``save() -> mark`` and ``rewind(mark, length)``: forget what came after. A cache that can drop positions keeps
  ``length`` of them; one that cannot (a ring, a running sum) goes back to the mark. Either way ``length`` then says
  how many are left, and the caller feeds the tokens after them again;
* ``nbytes``: memory held.

A mixer makes its own: ``mixer.new_cache(batch, capacity, dtype)``. A model holds one per layer in a `ModelCache`.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from minillm.autograd import Tensor, is_recording
from minillm.checks import require, require_positive


def as_arrays(where: str, *values: Any) -> tuple[np.ndarray, ...]:
    """The arrays of tensors on their way into a cache; an error if a gradient would be lost there."""
    if is_recording() and any(isinstance(v, Tensor) and v.requires_grad for v in values):
        raise RuntimeError(f"{where}: decoding with a cache has no gradient. Wrap it in `with no_grad():`.")
    return tuple(v.data if isinstance(v, Tensor) else v for v in values)


def like(given: Any, *arrays: np.ndarray) -> tuple:
    """The arrays as tensors if what was given is one."""
    return tuple(Tensor(a) for a in arrays) if isinstance(given, Tensor) else arrays


def require_room(where: str, length: int, new: int, capacity: int | None) -> None:
    """Refuse positions that do not fit."""
    require(
        capacity is None or length + new <= capacity,
        where,
        "the context",
        f"at most {capacity} tokens long",
        f"{length} cached and {new} new ones",
        "Make the cache larger, or the text shorter.",
    )


class LayerCache:
    r"""Keys and values of one layer, any number of key/value heads.

    Equation: `kv-cache` append $k_t,v_t$; attend $q_t$ over $1..t$
    Equation: `kv-cache-size` per layer $BLH_{kv}(d_k+d_v)$ elements, $2BLH_{kv}d_{\rm head}$ for equal widths
    Equation: `kv-cache-prefix` the positions of a prefix lie in the same cache
    Shapes: keys (B, H_kv, capacity, d_k), values (B, H_kv, capacity, d_v)
    Raises: ValueError for sizes that are not positive, arrays that do not fit, or more positions than there is room for;
        RuntimeError if a gradient would be needed.
    Source: notes §4.2, §4.3, §8.4.
    Differs: the size is per layer for all L tokens, not per token (erratum 44).
    """

    def __init__(
        self, batch: int, n_kv_heads: int, capacity: int, d_k: int, d_v: int | None = None, dtype: Any = np.float32
    ):
        d_v = d_k if d_v is None else d_v
        sizes = {"batch": batch, "n_kv_heads": n_kv_heads, "capacity": capacity, "d_k": d_k, "d_v": d_v}
        for name, value in sizes.items():
            require_positive(value, "LayerCache", name, integer=True)
        self.keys = np.empty((batch, n_kv_heads, capacity, d_k), dtype)
        self.values = np.empty((batch, n_kv_heads, capacity, d_v), dtype)
        self.length = 0

    @property
    def batch(self) -> int:
        """How many sequences."""
        return len(self.keys)

    @property
    def capacity(self) -> int:
        """How many positions there is room for."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def key_positions(self) -> np.ndarray:
        """Positions of the cached keys."""
        return np.arange(self.length)

    def append(self, k: Any, v: Any) -> tuple[Any, Any]:
        """Store the new keys and values (B, H_kv, L_new, d); return all so far, as views."""
        keys, values = as_arrays("LayerCache", k, v)
        check_new("LayerCache", keys, values, self.keys, self.values)
        start, stop = self.length, self.length + keys.shape[2]
        require_room("LayerCache", start, keys.shape[2], self.capacity)
        self.keys[:, :, start:stop], self.values[:, :, start:stop] = keys, values
        self.length = stop
        return like(k, self.keys[:, :, :stop], self.values[:, :, :stop])

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def save(self) -> int:
        """A mark to come back to."""
        return self.length

    def rewind(self, mark: int, length: int) -> None:
        """Forget all positions from ``length`` on."""
        check_rewind("LayerCache", mark, length, self.length)
        self.length = length


def check_new(where: str, keys: np.ndarray, values: np.ndarray, kept_keys: np.ndarray, kept_values: np.ndarray) -> None:
    """Refuse new keys or values that are not (B, H_kv, L_new, d) of the cache's sizes."""
    for what, new, kept in (("the keys", keys, kept_keys), ("the values", values, kept_values)):
        B, H_kv, _, d = kept.shape
        fits = new.ndim == 4 and (*new.shape[:2], new.shape[3]) == (B, H_kv, d) and new.shape[2] == keys.shape[2]
        require(fits, where, what, f"of shape (B={B}, H_kv={H_kv}, L_new, {d}), as many as keys", new)


def check_rewind(where: str, mark: int, length: int, now: int) -> None:
    """Refuse to go forward, or back behind the mark."""
    require(mark <= length <= now, where, "the length to go back to", f"in {mark}..{now}, mark to now", length)


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
    def batch(self) -> int:
        """How many sequences."""
        return self.keys.shape[1]

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
        require_room("KVCache", self.length, n_new, self.capacity)
        return np.arange(self.length, self.length + n_new)

    def write(self, layer: int, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store the new keys and values of one layer; return views of all up to and including them."""
        stop = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : stop] = keys
        self.values[layer, :, :, self.length : stop] = values
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def layer(self, index: int) -> "KVLayer":
        """One layer's share, with the protocol of a layer's cache; the last layer's ``append`` counts the positions."""
        return KVLayer(self, index)

    def rows(self, rows: slice) -> "KVCache":
        """A cache of some of the sequences over the same memory, with a count of its own."""
        part = copy(self)
        part.keys, part.values = self.keys[:, rows], self.values[:, rows]
        return part

    def advance(self, n_new: int) -> None:
        """Count ``n_new`` positions as seen, after every layer has written them."""
        self.length += n_new

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]

    def save(self) -> int:
        """A mark to come back to."""
        return self.length

    def rewind(self, mark: int, length: int) -> None:
        """Forget all positions from ``length`` on."""
        check_rewind("KVCache", mark, length, self.length)
        self.length = length


class KVLayer:
    """A view of one layer of a `KVCache`; layers append in order, and the last one counts the positions.

    Raises: IndexError for a layer that does not exist; ValueError when the positions do not fit.
    """

    def __init__(self, cache: KVCache, index: int):
        n_layers = len(cache.keys)
        require(0 <= index < n_layers, "KVCache.layer", "index", f"in [0, {n_layers})", index, error=IndexError)
        self.cache, self.index, self.shown = cache, index, cache.length

    length = property(lambda self: self.cache.length, doc="Positions seen so far.")
    batch = property(lambda self: self.cache.batch, doc="How many sequences.")
    capacity = property(lambda self: self.cache.capacity, doc="How many positions there is room for.")

    @property
    def key_positions(self) -> np.ndarray:
        """Positions of the keys that the last ``append`` returned."""
        return np.arange(self.shown)

    def append(self, k: Any, v: Any) -> tuple[Any, Any]:
        """Store the new keys and values (B, H_kv, L_new, d_head); return all so far, as views."""
        keys, values = as_arrays("KVCache", k, v)
        check_new("KVCache", keys, values, self.cache.keys[self.index], self.cache.values[self.index])
        self.cache.reserve(keys.shape[2])
        both = self.cache.write(self.index, keys, values)
        self.shown = self.cache.length + keys.shape[2]
        if self.index == len(self.cache.keys) - 1:
            self.cache.advance(keys.shape[2])
        return like(k, *both)


class ModelCache:
    """One cache per layer, of any kinds, as `Transformer.new_cache` makes it.

    Raises: ValueError for no layers, or more positions than some layer has room for.
    """

    def __init__(self, layers: Sequence[Any]):
        require(len(layers) > 0, "ModelCache", "layers", "at least one", "none")
        self.layers = list(layers)

    length = property(lambda self: self.layers[0].length, doc="Positions seen so far.")
    batch = property(lambda self: self.layers[0].batch, doc="How many sequences.")
    nbytes = property(lambda self: sum(layer.nbytes for layer in self.layers), doc="Memory in bytes.")

    @property
    def capacity(self) -> int | None:
        """How many positions there is room for; None if no layer limits it."""
        return min((c for c in (layer.capacity for layer in self.layers) if c is not None), default=None)

    def layer(self, index: int) -> Any:
        """The cache of one layer."""
        return self.layers[index]

    def reserve(self, n_new: int) -> np.ndarray:
        """The positions of the next ``n_new`` tokens, or an error if they do not fit."""
        require_room("ModelCache", self.length, n_new, self.capacity)
        return np.arange(self.length, self.length + n_new)

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        for layer in self.layers:
            layer.select(rows)

    def save(self) -> list:
        """A mark to come back to."""
        return [layer.save() for layer in self.layers]

    def rewind(self, mark: list, length: int) -> None:
        """Forget positions in every layer; if some layer can only go back to the mark, all do."""
        self._rewind(mark, length)
        if any(layer.length != self.length for layer in self.layers):
            self._rewind(mark, min(layer.length for layer in self.layers))

    def _rewind(self, mark: list, length: int) -> None:
        for layer, saved in zip(self.layers, mark, strict=True):
            layer.rewind(saved, length)
