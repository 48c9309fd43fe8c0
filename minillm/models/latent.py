r"""A Perceiver-style model: a long input is read by a few latents, and all depth is spent on these."""

from typing import Any

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.checks import require, require_positive
from minillm.nn.layers import RMSNorm
from minillm.nn.module import Module
from minillm.nn.perceiver import LatentBlock, learnt_array, over_batch


class LatentTransformer(Module):
    r"""Learnt latents through a number of latent blocks; inputs may be of any kind and length.

    Equation: `latent-transformer-block` each block reads the input again
    Equation: `vision-text-cross` inputs of another modality and width, ``d_input``
    Shapes: x (B, L, d_input), keep broadcastable to (B, H, M, L) -> (B, M, d_model)
    Raises: ValueError for sizes that are not positive, heads that do not divide, or inputs of another width.
    Source: notes §4.6, §4.5; Jaegle et al. 2021.
    """

    def __init__(
        self,
        d_model: int,
        n_layers: int,
        n_heads: int,
        n_latents: int,
        rng: np.random.Generator,
        d_input: int | None = None,
        d_ff: int | None = None,
    ):
        require_positive(n_layers, "LatentTransformer", "n_layers", integer=True)
        self.d_input = d_model if d_input is None else d_input
        self.latents = learnt_array(n_latents, d_model, rng, "LatentTransformer", "n_latents")
        d_ff = 4 * d_model if d_ff is None else d_ff
        self.blocks = [LatentBlock(d_model, n_heads, d_ff, rng, self.d_input) for _ in range(n_layers)]
        self.norm = RMSNorm(d_model)

    def forward(self, x: Float[Tensor, "B L d_input"], keep: Any = None) -> Float[Tensor, "B M d_model"]:
        fits = x.ndim == 3 and x.shape[-1] == self.d_input
        require(fits, "LatentTransformer", "x", f"of shape (B, L, {self.d_input})", x)
        z = over_batch(self.latents, x.shape[0])  # (B, M, d_model)
        for block in self.blocks:
            z = block(z, x, keep)
        return self.norm(z)
