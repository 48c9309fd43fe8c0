"""A cache in few bits: keys with a scale per channel, values with a scale per token."""

from typing import Any

import numpy as np

from minillm.checks import require_one_of, require_positive
from minillm.functional.quantisation import Quantised, dequantise, pack_int4, quantise_int4, quantise_int8, unpack_int4
from minillm.nn.cache import as_arrays, check_new, check_rewind, like, require_room


def quantised_cache_nbytes(batch: int, n_kv_heads: int, capacity: int, d_head: int, bits: int, group: int) -> int:
    r"""Bytes of one layer's quantised cache: codes, float32 scales, and the newest tokens in float32.

    Equation: `kv-cache-quantised` $2BLH_{kv}\lceil d_{\rm head}b/8\rceil+4BH_{kv}(\frac LGd_{\rm head}+L)+8BH_{kv}Gd_{\rm head}$
    Source: deepseek (the pointers on latent attention).
    """
    heads, groups = batch * n_kv_heads, capacity // group
    codes = 2 * heads * groups * group * -(-d_head * bits // 8)
    return codes + 4 * heads * (groups * d_head + groups * group) + 8 * heads * group * d_head


class QuantisedCache:
    r"""Keys and values of one layer as int8 or int4.

    Some channels of the keys are large for every token, so that a scale per channel fits them, over a group of G
    tokens; values have no such channels and take a scale per token. The newest tokens wait in full precision until
    their group is complete.

    Equation: `kv-cache-quantised` int8/int4 per-channel keys, per-token values; $\lvert\hat x-x\rvert\le s/2$
    Shapes: keys (B, H_kv, capacity, d_k), values (B, H_kv, capacity, d_v), at ``bits`` bits a number
    Raises: ValueError for sizes that are not positive, other bits than 4 or 8, arrays that do not fit, or more
        positions than there is room for; RuntimeError if a gradient would be needed.
    Source: deepseek (the pointers on latent attention); Liu et al. 2024 (KIVI).

    ``append`` returns older tokens as they are stored, and the new ones as they came.
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        capacity: int,
        d_k: int,
        d_v: int | None = None,
        *,
        bits: int = 8,
        group: int = 32,
        dtype: Any = np.float32,
    ):
        d_v = d_k if d_v is None else d_v
        sizes = {"batch": batch, "n_kv_heads": n_kv_heads, "capacity": capacity, "d_k": d_k, "d_v": d_v, "group": group}
        for name, value in sizes.items():
            require_positive(value, "QuantisedCache", name, integer=True)
        require_one_of(bits, (4, 8), "QuantisedCache", "bits")
        self.bits, self.group, self.capacity, self.length, self.stored = bits, group, capacity, 0, 0
        heads, groups = (batch, n_kv_heads), capacity // group
        code = np.int8 if bits == 8 else np.uint8
        self.key_codes = np.empty((*heads, groups, group, -(-d_k * bits // 8)), code)
        self.value_codes = np.empty((*heads, groups, group, -(-d_v * bits // 8)), code)
        self.key_scales = np.empty((*heads, groups, 1, d_k), np.float32)
        self.value_scales = np.empty((*heads, groups, group, 1), np.float32)
        self.new_keys = np.empty((*heads, group, d_k), dtype)
        self.new_values = np.empty((*heads, group, d_v), dtype)

    @property
    def batch(self) -> int:
        """How many sequences."""
        return len(self.new_keys)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that is kept, by name."""
        kept = ("key_codes", "value_codes", "key_scales", "value_scales", "new_keys", "new_values")
        return {name: getattr(self, name) for name in kept}

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def key_positions(self) -> np.ndarray:
        """Positions of the cached keys."""
        return np.arange(self.length)

    def append(self, k: Any, v: Any) -> tuple[Any, Any]:
        """Store the new keys and values (B, H_kv, L_new, d); return all so far."""
        keys, values = as_arrays("QuantisedCache", k, v)
        check_new("QuantisedCache", keys, values, self.new_keys, self.new_values)
        require_room("QuantisedCache", self.length, keys.shape[2], self.capacity)
        old_keys, old_values = self.read()
        result = np.concatenate([old_keys, keys], axis=2), np.concatenate([old_values, values], axis=2)
        waiting = self.length - self.stored
        for start in range(0, keys.shape[2] + waiting, self.group):  # places among the tokens that are not stored yet
            stop = min(start + self.group, keys.shape[2] + waiting)
            first = waiting if start == 0 else 0
            new = slice(max(start - waiting, 0), stop - waiting)
            self.new_keys[:, :, first : stop - start] = keys[:, :, new]
            self.new_values[:, :, first : stop - start] = values[:, :, new]
            if stop - start == self.group:
                self._store()
        self.length += keys.shape[2]
        return like(k, *result)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All positions so far, the older ones as their codes say: (B, H_kv, length, d) each."""
        n, waiting = self.stored // self.group, self.length - self.stored
        keys = self._decode(self.key_codes[:, :, :n], self.key_scales[:, :, :n], self.new_keys)
        values = self._decode(self.value_codes[:, :, :n], self.value_scales[:, :, :n], self.new_values)
        return (
            np.concatenate([keys, self.new_keys[:, :, :waiting]], axis=2),
            np.concatenate([values, self.new_values[:, :, :waiting]], axis=2),
        )

    def _store(self) -> None:
        """Turn the complete group of newest tokens into codes; sets no length."""
        quantise, at = quantise_int8 if self.bits == 8 else quantise_int4, self.stored // self.group
        keys, values = quantise(self.new_keys, axis=-2), quantise(self.new_values, axis=-1)
        pack = pack_int4 if self.bits == 4 else lambda codes: codes
        self.key_codes[:, :, at], self.key_scales[:, :, at] = pack(keys.codes), keys.scale
        self.value_codes[:, :, at], self.value_scales[:, :, at] = pack(values.codes), values.scale
        self.stored += self.group

    def _decode(self, codes: np.ndarray, scales: np.ndarray, shaped: np.ndarray) -> np.ndarray:
        """(B, H_kv, groups, G, bytes) -> (B, H_kv, groups G, d)."""
        B, H_kv, n, G, _ = codes.shape
        d = shaped.shape[-1]
        codes = codes if self.bits == 8 else unpack_int4(codes, d)
        return dequantise(Quantised(codes, scales)).reshape(B, H_kv, n * G, d).astype(shaped.dtype, copy=False)

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        for name, array in self.arrays.items():
            setattr(self, name, array[rows])

    def save(self) -> tuple[int, int, np.ndarray, np.ndarray]:
        """A mark to come back to; the tokens that are not stored yet are copied."""
        return self.length, self.stored, self.new_keys.copy(), self.new_values.copy()

    def rewind(self, mark: tuple[int, int, np.ndarray, np.ndarray], length: int) -> None:
        """Forget tokens that are not stored yet, or go back to the mark if some already are codes."""
        check_rewind("QuantisedCache", mark[0], length, self.length)
        if length >= self.stored:
            self.length = length
        else:
            self.length, self.stored = mark[:2]
            self.new_keys, self.new_values = mark[2].copy(), mark[3].copy()
