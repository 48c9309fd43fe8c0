r"""Dual cross-attention between the scales of an image encoder, as written.

The first reading of the notes' DCA. Every scale of a U-shaped network is cut into the same P patches, so that its
features become tokens $\mathbf T_i$, (P, C_i). Channels of one scale then look at the channels of all scales, and
after that patches look at patches; the tokens are spread over the image again and added to the features.
"""

import numpy as np
from jaxtyping import Float

from minillm.autograd import Tensor
from minillm.autograd.registry import written
from minillm.checks import require, require_positive
from minillm.functional.attention import attention_weights, scaled_scores
from minillm.functional.linear_algebra import merge_heads, split_heads


def check_image(name: str, x, grid: int) -> None:
    """Refuse images that do not fall into grid x grid patches of one size."""
    require_positive(grid, name, "grid", integer=True)
    fits = x.ndim == 4 and x.shape[2] % grid == 0 and x.shape[3] % grid == 0
    require(fits, name, "x", f"of shape (B, C, height, width), both divisible by the grid, {grid}", x)


def _example_pool(rng):
    return (rng.normal(size=(2, 3, *[(4, 4), (2, 6), (2, 2)][rng.integers(3)])),), {"grid": 2}


@written("pool_patches", example=_example_pool)
def pool_patches(x: Float[Tensor, "B C h w"], grid: int) -> Float[Tensor, "B P C"]:
    r"""Average each of grid x grid patches: one token a patch.

    Equation: `dca-dual-cross-attention` tokens $\mathbf T_i\,(P,C_i)$ pooled from scale i
    Shapes: x (B, C, height, width) -> (B, P, C) with P = grid^2, row by row
    Raises: ValueError unless the grid divides height and width.
    Source: notes §4.9 (heading); Ates, Mohan and Celik 2023.
    """
    check_image("pool_patches", x, grid)
    B, C, h, w = x.shape
    patches = x.reshape(B, C, grid, h // grid, grid, w // grid).mean((3, 5))  # (B, C, grid, grid)
    return patches.reshape(B, C, grid * grid).transpose(1, 2)


def _example_spread(rng):
    return (rng.normal(size=(2, 4, 3)),), {"height": int(2 * rng.integers(1, 4)), "width": 4}


@written("spread_patches", example=_example_spread)
def spread_patches(tokens: Float[Tensor, "B P C"], height: int, width: int) -> Float[Tensor, "B C h w"]:
    r"""Give every pixel of a patch its token: the nearest-neighbour way back to the image.

    Equation: `dca-dual-cross-attention` then upsample
    Shapes: tokens (B, P, C) -> (B, C, height, width)
    Raises: ValueError unless P is a square whose root divides height and width.
    Source: notes §4.9 (heading); Ates, Mohan and Celik 2023.
    """
    require(tokens.ndim == 3, "spread_patches", "the tokens", "of shape (B, P, C)", tokens)
    B, P, C = tokens.shape
    grid = int(np.sqrt(P))
    fits = grid * grid == P and height % grid == 0 and width % grid == 0
    require(fits, "spread_patches", "P", f"a square whose root divides {height} and {width}", P)
    image = tokens.transpose(1, 2).reshape(B, C, grid, 1, grid, 1)
    return image.expand(B, C, grid, height // grid, grid, width // grid).reshape(B, C, height, width)


def _example_channel(rng):
    P, C_i, C = [(4, 2, 5), (1, 1, 3), (9, 3, 3)][rng.integers(3)]
    return (rng.normal(size=(2, P, C_i)), rng.normal(size=(2, P, C)), rng.normal(size=(2, P, C))), {}


@written("channel_cross_attention", example=_example_channel)
def channel_cross_attention(
    q: Float[Tensor, "B P C_i"], k: Float[Tensor, "B P C"], v: Float[Tensor, "B P C"]
) -> Float[Tensor, "B P C_i"]:
    r"""Each channel of one scale looks at the channels of all scales.

    Equation: `dca-dual-cross-attention` $\big[\mathrm{softmax}(\mathbf Q_i^\top\mathbf K/\sqrt C)\mathbf V^\top\big]^\top$
    Shapes: q (B, P, C_i) from one scale, k and v (B, P, C) from all of them -> (B, P, C_i)
    Raises: ValueError if the shapes do not belong together.
    Source: notes §4.9 (heading); Ates, Mohan and Celik 2023.
    """
    name = "channel_cross_attention"
    require(q.ndim == 3, name, "q", "of shape (B, P, C_i)", q)
    require(k.ndim == 3 and k.shape[:2] == q.shape[:2], name, "k", f"of shape {(*q.shape[:2], 'C')}", k)
    require(v.shape == k.shape, name, "v", f"of the shape of k, {k.shape}", v)
    weights = attention_weights(scaled_scores(q.T, k.T, k.shape[2] ** -0.5))  # (B, C_i, C)
    return (weights @ v.T).T  # (B, P, C_i)


def _example_spatial(rng):
    P, C, C_i, H = [(4, 6, 2, 2), (1, 3, 3, 1), (3, 4, 2, 2)][rng.integers(3)]
    return (rng.normal(size=(2, P, C)), rng.normal(size=(2, P, C)), rng.normal(size=(2, P, C_i))), {"H": H}


@written("spatial_cross_attention", example=_example_spatial)
def spatial_cross_attention(
    q: Float[Tensor, "B P C"], k: Float[Tensor, "B P C"], v: Float[Tensor, "B P C_i"], H: int
) -> Float[Tensor, "B P C_i"]:
    r"""Patches look at patches by the features of all scales, and take the values of one scale.

    Equation: `dca-dual-cross-attention` $\mathrm{softmax}(\mathbf Q\mathbf K^\top/\sqrt{C/H})\mathbf V_i$
    Shapes: q, k (B, P, C) from all scales, v (B, P, C_i) from one -> (B, P, C_i); H heads cut C and C_i
    Raises: ValueError if the shapes do not belong together or H does not divide C and C_i.
    Source: notes §4.9 (heading); Ates, Mohan and Celik 2023.
    """
    name = "spatial_cross_attention"
    require_positive(H, name, "H", integer=True)
    require(q.ndim == 3 and k.shape == q.shape, name, "q and k", "of one shape (B, P, C)", k)
    require(v.ndim == 3 and v.shape[:2] == q.shape[:2], name, "v", f"of shape {(*q.shape[:2], 'C_i')}", v)
    require(q.shape[2] % H == 0 and v.shape[2] % H == 0, name, "H", f"a divisor of {q.shape[2]} and {v.shape[2]}", H)
    weights = attention_weights(scaled_scores(split_heads(q, H), split_heads(k, H)))  # (B, H, P, P)
    return merge_heads(weights @ split_heads(v, H))  # (B, P, C_i)
