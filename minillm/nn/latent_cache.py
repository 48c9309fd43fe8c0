"""The cache of DeepSeek's latent attention: one narrow vector and one rotary key per token."""

from typing import Any

import numpy as np

from minillm.checks import require, require_positive
from minillm.nn.cache import as_arrays, check_rewind, like, require_room


class LatentCache:
    r"""Latents and rotary keys of one layer, side by side, shared by all heads.

    Equation: `kv-cache-mla` store $\mathbf c^{KV}$ and the rope key: $N_{\rm layer}BL(d_c+d_R)$ elements
    Equation: `mla-cache-size` $d_c+d_R$ per token and layer
    Shapes: joint (B, capacity, d_c + d_R)
    Raises: ValueError for sizes that are not positive, arrays that do not fit, or more positions than there is room for;
        RuntimeError if a gradient would be needed.
    Source: deepseek (the slides on latent attention).
    """

    def __init__(self, batch: int, capacity: int, d_c: int, d_R: int, dtype: Any = np.float32):
        for name, value in {"batch": batch, "capacity": capacity, "d_c": d_c, "d_R": d_R}.items():
            require_positive(value, "LatentCache", name, integer=True)
        self.d_c = d_c
        self.joint = np.empty((batch, capacity, d_c + d_R), dtype)
        self.length = 0

    @property
    def batch(self) -> int:
        """How many sequences."""
        return len(self.joint)

    @property
    def capacity(self) -> int:
        """How many positions there is room for."""
        return self.joint.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.joint.nbytes

    @property
    def key_positions(self) -> np.ndarray:
        """Positions of the cached latents."""
        return np.arange(self.length)

    @property
    def filled(self) -> np.ndarray:
        """Latents and rotary keys of all positions so far, joint: (B, length, d_c + d_R)."""
        return self.joint[:, : self.length]

    def append(self, latents: Any, rope_keys: Any) -> tuple[Any, Any]:
        """Store new latents (B, L_new, d_c) and rotary keys (B, L_new, d_R); return all so far, as views."""
        c, k_r = as_arrays("LatentCache", latents, rope_keys)
        B, capacity, width = self.joint.shape
        for what, new, d in (("the latents", c, self.d_c), ("the rotary keys", k_r, width - self.d_c)):
            fits = new.ndim == 3 and (new.shape[0], new.shape[2]) == (B, d) and new.shape[1] == c.shape[1]
            require(fits, "LatentCache", what, f"of shape (B={B}, L_new, {d}), as many as latents", new)
        start, stop = self.length, self.length + c.shape[1]
        require_room("LatentCache", start, c.shape[1], capacity)
        self.joint[:, start:stop, : self.d_c], self.joint[:, start:stop, self.d_c :] = c, k_r
        self.length = stop
        return like(latents, self.filled[..., : self.d_c], self.filled[..., self.d_c :])

    def select(self, rows: np.ndarray) -> None:
        """Keep (or repeat) some sequences of the batch, in the given order."""
        self.joint = self.joint[rows]

    def save(self) -> int:
        """A mark to come back to."""
        return self.length

    def rewind(self, mark: int, length: int) -> None:
        """Forget all positions from ``length`` on."""
        check_rewind("LatentCache", mark, length, self.length)
        self.length = length
