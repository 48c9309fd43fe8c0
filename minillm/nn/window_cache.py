"""Caches of fixed size: a ring for window attention, a running sum for linear attention."""

from typing import Any, NamedTuple

import numpy as np

from minillm.checks import require, require_positive
from minillm.nn.cache import as_arrays, check_new, check_rewind, like


class WindowCache:
    r"""A ring of the last w positions; the newest overwrites the oldest.

    Equation: `kv-cache-window` ring buffer with window attention: query t sees positions $t-w+1..t$
    Shapes: keys (B, H_kv, w, d_k), values (B, H_kv, w, d_v)
    Raises: ValueError for sizes that are not positive or arrays that do not fit; RuntimeError if a gradient would be
        needed.
    Source: notes §4.3.
    Differs: equals attention with a window of w, and not recomputation on the last w tokens: a kept value was
        made by layers that saw further back (erratum 43).

    ``append`` returns what the new queries may look at, in the order of positions when there are several of them, in
    the ring's order when there is one. ``key_positions`` names them; a query at p sees those with p - w < s <= p.
    """

    capacity = None

    def __init__(
        self, batch: int, n_kv_heads: int, window: int, d_k: int, d_v: int | None = None, dtype: Any = np.float32
    ):
        d_v = d_k if d_v is None else d_v
        sizes = {"batch": batch, "n_kv_heads": n_kv_heads, "window": window, "d_k": d_k, "d_v": d_v}
        for name, value in sizes.items():
            require_positive(value, "WindowCache", name, integer=True)
        self.keys = np.empty((batch, n_kv_heads, window, d_k), dtype)
        self.values = np.empty((batch, n_kv_heads, window, d_v), dtype)
        self.length = 0
        self.key_positions = np.arange(0)

    @property
    def batch(self) -> int:
        """How many sequences."""
        return len(self.keys)

    @property
    def window(self) -> int:
        """How many positions are kept."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Memory in bytes, whatever the length."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, k: Any, v: Any) -> tuple[Any, Any]:
        """Take new keys and values (B, H_kv, L_new, d) in; return those that some new query may look at."""
        keys, values = as_arrays("WindowCache", k, v)
        check_new("WindowCache", keys, values, self.keys, self.values)
        start, stop, w = self.length, self.length + keys.shape[2], self.window
        if keys.shape[2] == 1:
            self._write(keys, values, start)
            kept = min(stop, w)
            slots = np.arange(kept)
            self.key_positions = slots + (start - slots) // w * w  # the last position that fell on each place
            return like(k, self.keys[:, :, :kept], self.values[:, :, :kept])
        old = np.arange(max(0, start - w + 1), start)
        all_keys = np.concatenate([self.keys[:, :, old % w], keys], axis=2)
        all_values = np.concatenate([self.values[:, :, old % w], values], axis=2)
        self._write(keys, values, start)
        self.key_positions = np.arange(stop - all_keys.shape[2], stop)
        return like(k, all_keys, all_values)

    def _write(self, keys: np.ndarray, values: np.ndarray, start: int) -> None:
        """Put the last w of the new positions into their places of the ring."""
        stop = start + keys.shape[2]
        kept = np.arange(max(start, stop - self.window), stop)
        self.keys[:, :, kept % self.window] = keys[:, :, kept - start]
        self.values[:, :, kept % self.window] = values[:, :, kept - start]
        self.length = stop

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def save(self) -> tuple[int, np.ndarray, np.ndarray]:
        """A mark to come back to: a copy, for the ring overwrites what it held."""
        return self.length, self.keys.copy(), self.values.copy()

    def rewind(self, mark: tuple[int, np.ndarray, np.ndarray], length: int) -> None:
        """Go back to the mark, unless nothing has to be forgotten."""
        check_rewind("WindowCache", mark[0], length, self.length)
        if length < self.length:
            self.length, self.keys, self.values = mark[0], mark[1].copy(), mark[2].copy()


class Sums(NamedTuple):
    """The running sums of linear attention: (B, H, d_phi, d_v) and (B, H, d_phi)."""

    state: np.ndarray
    normaliser: np.ndarray


class StateCache:
    r"""The running sums of causal linear attention, which stand for all positions so far.

    Equation: `linear-attention-causal` $\mathbf S_t=\mathbf S_{t-1}+\phi(k_t)v_t^\top$, $\mathbf z_t=\mathbf z_{t-1}+\phi(k_t)$
    Shapes: state (B, H, d_phi, d_v), normaliser (B, H, d_phi), both 0 at the start
    Raises: ValueError for sizes that are not positive or sums of another shape; RuntimeError if a gradient would be
        needed.
    Source: notes §4.10.

    It does not grow: $BH d_\phi(d_v+1)$ numbers a layer at any length. ``append(phi_k, v)`` adds new positions and
    returns the sums *before* them, which is what a chunk of new queries starts from.
    """

    capacity = None

    def __init__(self, batch: int, n_heads: int, d_phi: int, d_v: int, dtype: Any = np.float32):
        for name, value in {"batch": batch, "n_heads": n_heads, "d_phi": d_phi, "d_v": d_v}.items():
            require_positive(value, "StateCache", name, integer=True)
        self.sums = Sums(np.zeros((batch, n_heads, d_phi, d_v), dtype), np.zeros((batch, n_heads, d_phi), dtype))
        self.length = 0

    state = property(lambda self: self.sums.state, doc="Sum of outer products of mapped keys and values.")
    normaliser = property(lambda self: self.sums.normaliser, doc="Sum of mapped keys.")
    batch = property(lambda self: len(self.sums.state), doc="How many sequences.")
    nbytes = property(lambda self: sum(a.nbytes for a in self.sums), doc="Memory in bytes, whatever the length.")

    def append(self, phi_k: Any, v: Any) -> Sums:
        """Add mapped keys (B, H, L_new, d_phi) and values (B, H, L_new, d_v); return the sums before them."""
        keys, values = as_arrays("StateCache", phi_k, v)
        B, H, d_phi, d_v = self.state.shape
        for what, new, d in (("the mapped keys", keys, d_phi), ("the values", values, d_v)):
            fits = new.ndim == 4 and (*new.shape[:2], new.shape[3]) == (B, H, d) and new.shape[2] == keys.shape[2]
            require(fits, "StateCache", what, f"of shape (B={B}, H={H}, L_new, {d}), as many as keys", new)
        before = self.sums
        self.sums = Sums(before.state + keys.swapaxes(-1, -2) @ values, before.normaliser + keys.sum(2))
        self.length += keys.shape[2]
        return before

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        self.sums = Sums(*(a[rows] for a in self.sums))

    def save(self) -> tuple[int, Sums]:
        """A mark to come back to; sums are never changed in place, so this costs nothing."""
        return self.length, self.sums

    def rewind(self, mark: tuple[int, Sums], length: int) -> None:
        """Go back to the mark, unless nothing has to be forgotten: a sum cannot lose single terms exactly."""
        check_rewind("StateCache", mark[0], length, self.length)
        if length < self.length:
            self.length, self.sums = mark
