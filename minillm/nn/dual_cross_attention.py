"""Dual cross-attention as a module: the features of several scales in, features of the same shapes out."""

from collections.abc import Sequence

import numpy as np

from minillm.autograd import Tensor, cat
from minillm.checks import require, require_positive
from minillm.functional.dual_cross_attention import (
    channel_cross_attention,
    check_image,
    pool_patches,
    spatial_cross_attention,
    spread_patches,
)
from minillm.fused.linear import linear
from minillm.fused.norms import layer_norm
from minillm.nn.module import Module, parameter


class Affine(Module):
    """A gain and a shift for each channel: a depthwise 1 x 1 projection, or the parameters of a norm."""

    def __init__(self, width: int):
        self.gain, self.shift = parameter(np.ones(width)), parameter(np.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


class Scale(Module):
    """What belongs to one scale: its norms, its projections, its way back to the image."""

    def __init__(self, width: int, rng: np.random.Generator):
        self.channel_norm, self.spatial_norm = Affine(width), Affine(width)
        self.query, self.value = Affine(width), Affine(width)
        self.w_out = parameter(rng.normal(0.0, width**-0.5, size=(width, width)))
        self.batch_norm = Affine(width)


class DualCrossAttention(Module):
    r"""Channels of every scale look at the channels of all, then patches at patches.

    Equation: `dca-dual-cross-attention` $\mathbf T_i\mathrel{+}=\big[\mathrm{softmax}(\mathbf Q_i^\top\mathbf K/\sqrt C)\mathbf V^\top\big]^\top$, then $\mathbf T_i\mathrel{+}=\mathrm{softmax}(\mathbf Q\mathbf K^\top/\sqrt{C/H})\mathbf V_i$
    Shapes: a list of (B, C_i, height_i, width_i) -> the same shapes
    Raises: ValueError for no scales, widths that n_heads does not divide, or images that the grid does not divide.
    Source: notes §4.9 (heading); Ates, Mohan and Celik 2023.

    The tokens go back by nearest-neighbour upsampling, a 1 x 1 convolution, the addition of the raw feature, a batch
    norm over batch and pixels (statistics of the batch at hand, also when evaluating) and ReLU.
    """

    def __init__(self, channels: Sequence[int], grid: int, n_heads: int, rng: np.random.Generator, eps: float = 1e-5):
        where = "DualCrossAttention"
        require(len(channels) > 0, where, "channels", "one width a scale, at least one", list(channels))
        require_positive(grid, where, "grid", integer=True)
        require_positive(n_heads, where, "n_heads", integer=True)
        for width in channels:
            require_positive(width, where, "channels", integer=True)
            require(width % n_heads == 0, where, "n_heads", f"a divisor of every width, {list(channels)}", n_heads)
        self.channels, self.grid, self.n_heads, self.eps = tuple(channels), grid, n_heads, eps
        total = sum(channels)
        self.scales = [Scale(width, rng) for width in channels]
        self.channel_key, self.channel_value = Affine(total), Affine(total)
        self.spatial_query, self.spatial_key = Affine(total), Affine(total)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        wanted, given = f"{len(self.channels)} images, one a scale", f"{len(features)}"
        require(len(features) == len(self.channels), "DualCrossAttention", "features", wanted, given)
        for x, width in zip(features, self.channels, strict=True):
            check_image("DualCrossAttention", x, self.grid)
            require(x.shape[1] == width, "DualCrossAttention", "x", f"of {width} channels", x)
        tokens = [pool_patches(x, self.grid) for x in features]  # (B, P, C_i) each
        tokens = self._over_channels(tokens)
        tokens = self._over_patches(tokens)
        return [self._back(t, x, s) for t, x, s in zip(tokens, features, self.scales, strict=True)]

    def _over_channels(self, tokens: list[Tensor]) -> list[Tensor]:
        normed = [self._norm(t, s.channel_norm) for t, s in zip(tokens, self.scales, strict=True)]
        joint = cat(normed, axis=-1)  # (B, P, C)
        k, v = self.channel_key(joint), self.channel_value(joint)
        queries = [s.query(n) for s, n in zip(self.scales, normed, strict=True)]
        return [t + channel_cross_attention(q, k, v) for t, q in zip(tokens, queries, strict=True)]

    def _over_patches(self, tokens: list[Tensor]) -> list[Tensor]:
        normed = [self._norm(t, s.spatial_norm) for t, s in zip(tokens, self.scales, strict=True)]
        joint = cat(normed, axis=-1)  # (B, P, C)
        q, k = self.spatial_query(joint), self.spatial_key(joint)
        values = [s.value(n) for s, n in zip(self.scales, normed, strict=True)]
        return [t + spatial_cross_attention(q, k, v, self.n_heads) for t, v in zip(tokens, values, strict=True)]

    def _norm(self, tokens: Tensor, affine: Affine) -> Tensor:
        return layer_norm(tokens, affine.gain, affine.shift, eps=self.eps)

    def _back(self, tokens: Tensor, raw: Tensor, scale: Scale) -> Tensor:
        """From tokens to the image; a 1 x 1 convolution is the same map for every pixel, so it may go first."""
        image = spread_patches(linear(tokens, scale.w_out), raw.shape[2], raw.shape[3]) + raw
        pixels = image.permute(0, 2, 3, 1)  # (B, h, w, C_i)
        mean, var = pixels.mean((0, 1, 2)), pixels.var((0, 1, 2))
        pixels = scale.batch_norm((pixels - mean) / (var + self.eps).sqrt()).relu()
        return pixels.permute(0, 3, 1, 2)
