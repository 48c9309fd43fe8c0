"""Attention through latents and inducing points: lengths, order, masks, gradients, bad sizes."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.nn.perceiver import InducedSetAttention, LatentBlock, over_batch


def stream(rng, *shape):
    return Tensor(rng.normal(size=shape).astype(np.float32))


@pytest.mark.equation("latent-transformer-block", "perceiver-latent-attention")
def test_a_latent_block_has_the_latents_length_for_any_text():
    rng = np.random.default_rng(0)
    block, z = LatentBlock(8, 2, 12, rng, d_memory=6), Tensor(rng.normal(size=(3, 8)).astype(np.float32))
    for L in (1, 5, 40):
        x = stream(rng, 2, L, 6)
        out = block(over_batch(z, 2), x)
        assert out.shape == (2, 3, 8)
        order = rng.permutation(L)
        np.testing.assert_allclose(block(over_batch(z, 2), Tensor(x.data[:, order])).data, out.data, atol=1e-5)


@pytest.mark.equation("latent-transformer-block")
def test_with_silent_branches_the_latents_pass_through():
    """Erratum 25: the residual additions are there."""
    rng = np.random.default_rng(1)
    block = LatentBlock(8, 2, 12, rng)
    for weight in (block.cross.w_out, block.attention.w_out, block.ffn.w_down):
        weight.data[...] = 0
    z = stream(rng, 2, 3, 8)
    np.testing.assert_array_equal(block(z, stream(rng, 2, 5, 8)).data, z.data)


@pytest.mark.equation("set-transformer-isab")
def test_inducing_points_keep_the_order_of_a_set_and_ignore_padding():
    rng = np.random.default_rng(2)
    layer, x = InducedSetAttention(8, 2, 12, 3, rng), stream(rng, 2, 7, 8)
    order, out = rng.permutation(7), layer(x)
    np.testing.assert_allclose(layer(Tensor(x.data[:, order])).data, out.data[:, order], atol=1e-5)
    padded = Tensor(np.concatenate([x.data, np.full((2, 2, 8), 9, np.float32)], axis=1))
    keep = (np.arange(9) < 7)[None, None, None]
    np.testing.assert_allclose(layer(padded, keep).data[:, :7], out.data, atol=1e-5)


@pytest.mark.equation("set-transformer-isab", "latent-transformer-block")
def test_every_parameter_receives_a_gradient():
    rng = np.random.default_rng(3)
    x = stream(rng, 2, 5, 8)
    block, layer = LatentBlock(8, 2, 12, rng), InducedSetAttention(8, 2, 12, 3, rng)
    latents = Tensor(rng.normal(size=(3, 8)).astype(np.float32), requires_grad=True)
    for out, parameters in (
        (block(over_batch(latents, 2), x), [latents, *block.parameters()]),
        (layer(x), layer.parameters()),
    ):
        for gradient in grad([out], parameters, [rng.normal(size=out.shape).astype(np.float32)]):
            assert np.isfinite(gradient.data).all() and gradient.data.any()


def test_sizes_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="InducedSetAttention: n_points must be a positive integer, got 0"):
        InducedSetAttention(8, 2, 12, 0, rng)
    with pytest.raises(ValueError, match=r"InducedSetAttention: x must be of shape \(B, L, 8\), got shape \(2, 5, 6\)"):
        InducedSetAttention(8, 2, 12, 3, rng)(stream(rng, 2, 5, 6))
    with pytest.raises(ValueError, match="n_heads must be a divisor of d_model = 8, got 3"):
        LatentBlock(8, 3, 12, rng)
