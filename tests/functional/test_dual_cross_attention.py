"""Dual cross-attention: pooling and spreading, channels among channels, patches among patches, and the module."""

import numpy as np
import pytest

from minillm.autograd import Tensor
from minillm.functional.dual_cross_attention import (
    channel_cross_attention,
    pool_patches,
    spatial_cross_attention,
    spread_patches,
)
from minillm.nn.dual_cross_attention import DualCrossAttention

pytestmark = pytest.mark.equation("dca-dual-cross-attention")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).normal(size=shape))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_pooling_averages_patches_and_spreading_undoes_it_for_flat_ones():
    x = np.arange(16.0).reshape(1, 1, 4, 4)
    np.testing.assert_array_equal(pool_patches(Tensor(x), 2).data[0, :, 0], [2.5, 4.5, 10.5, 12.5])
    tokens = draw(2, 9, 3)
    image = spread_patches(tokens, 6, 9)
    assert image.shape == (2, 3, 6, 9)
    np.testing.assert_allclose(pool_patches(image, 3).data, tokens.data)


def test_channel_attention_is_the_stated_formula():
    q, k, v = draw(2, 5, 3), draw(2, 5, 7, seed=1), draw(2, 5, 7, seed=2)
    for b in range(2):
        weights = softmax(q.data[b].T @ k.data[b] / np.sqrt(7))  # (C_i, C)
        wanted = (weights @ v.data[b].T).T
        np.testing.assert_allclose(channel_cross_attention(q, k, v).data[b], wanted, rtol=1e-12)


def test_spatial_attention_is_the_stated_formula():
    H, q, k, v = 2, draw(1, 4, 6), draw(1, 4, 6, seed=1), draw(1, 4, 2, seed=2)
    found = spatial_cross_attention(q, k, v, H).data[0]
    for h in range(H):
        mine = slice(3 * h, 3 * h + 3)
        weights = softmax(q.data[0, :, mine] @ k.data[0, :, mine].T / np.sqrt(6 / H))
        np.testing.assert_allclose(found[:, h], weights @ v.data[0, :, h], rtol=1e-12)


def test_channel_attention_does_not_mind_the_order_of_patches_and_spatial_attention_follows_it():
    order = [2, 0, 3, 1]
    q, k, v = draw(1, 4, 2), draw(1, 4, 4, seed=1), draw(1, 4, 4, seed=2)
    shuffled = channel_cross_attention(q[:, order], k[:, order], v[:, order]).data
    np.testing.assert_allclose(shuffled, channel_cross_attention(q, k, v).data[:, order], rtol=1e-12)
    a = spatial_cross_attention(k, v, q, 2).data[:, order]
    np.testing.assert_allclose(spatial_cross_attention(k[:, order], v[:, order], q[:, order], 2).data, a, rtol=1e-12)


def module() -> tuple[DualCrossAttention, list[Tensor]]:
    rng = np.random.default_rng(0)
    images = [Tensor(rng.normal(size=s).astype(np.float32)) for s in ((2, 4, 8, 8), (2, 6, 4, 4), (2, 8, 2, 2))]
    return DualCrossAttention([4, 6, 8], 2, 2, rng), images


def test_the_module_keeps_shapes_and_mixes_the_scales():
    layer, images = module()
    out = layer(images)
    assert [y.shape for y in out] == [x.shape for x in images]
    assert all((y.data >= 0).all() for y in out)  # ends in ReLU
    changed = layer([images[0], images[1], images[2] * 3.0 + 1.0])
    assert np.abs(changed[0].data - out[0].data).max() > 1e-3  # the finest scale has heard of the coarsest
    total = sum(((y * y).sum() for y in out), start=Tensor(np.float32(0)))
    total.backward()
    # a shift of all keys of a softmax's row changes nothing, so the keys' shifts need not have one
    assert all(p.grad is not None for _, p in layer.named_parameters())


BAD = {
    "grid": (lambda: pool_patches(draw(1, 2, 4, 5), 2), "pool_patches: x must be of shape .* divisible by the grid, 2"),
    "zero": (lambda: pool_patches(draw(1, 2, 4, 4), 0), "grid must be a positive integer, got 0"),
    "square": (lambda: spread_patches(draw(1, 3, 2), 4, 4), "P must be a square whose root divides 4 and 4, got 3"),
    "axes": (lambda: spread_patches(draw(1, 1, 4, 2), 4, 4), r"the tokens must be of shape \(B, P, C\)"),
    "k": (lambda: channel_cross_attention(draw(1, 4, 2), draw(1, 3, 2), draw(1, 3, 2)), r"k must be of shape \(1, 4"),
    "v": (lambda: channel_cross_attention(draw(1, 4, 2), draw(1, 4, 2), draw(1, 4, 3)), "v must be of the shape of k"),
    "H": (lambda: spatial_cross_attention(*(draw(1, 4, n) for n in (3, 3, 3)), 2), "H must be a divisor of 3 and 3"),
    "q and k": (lambda: spatial_cross_attention(*(draw(1, 4, n) for n in (4, 2, 4)), 2), "q and k must be of one"),
    "no scales": (lambda: DualCrossAttention([], 2, 2, np.random.default_rng(0)), "channels must be one width a scale"),
    "widths": (
        lambda: DualCrossAttention([4, 5], 2, 2, np.random.default_rng(0)),
        r"n_heads must be a divisor of every width, \[4, 5\], got 2",
    ),
    "missing": (lambda: module()[0](module()[1][:2]), "features must be 3 images, one a scale, got 2"),
    "channels": (lambda: module()[0](module()[1][::-1]), "x must be of 4 channels"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
