"""Norms: contracts, relations, errata and a second opinion from torch."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import norms as written
from minillm.fused import norms as derived

BOTH = pytest.mark.parametrize("form", [written, derived], ids=["written", "derived"])
shapes = st.sampled_from([(1, 1), (3, 1), (1, 8), (4, 7), (2, 3, 16)])
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, shape: tuple[int, ...]):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape[-1]), rng.normal(size=shape[-1]), rng.normal(size=shape)


def pull(function, *arrays, cotangent):
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    return [g.data for g in grad(function(*tensors), tensors, cotangent)]


@BOTH
@pytest.mark.equation("rmsnorm", "wn-rmsnorm-norm")
def test_rms_is_one_and_length_is_root_d(form):
    x = np.random.default_rng(0).normal(size=(4, 5120)) * 3
    y = form.rms_norm(Tensor(x), Tensor(np.ones(5120)), eps=1e-12).data
    np.testing.assert_allclose(np.sqrt((y**2).mean(-1)), 1, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), 71.554, rtol=1e-5)


@BOTH
@pytest.mark.equation("rmsnorm")
@given(seeds, shapes, st.sampled_from([-2.0, 0.25, 1000.0]))
def test_rms_norm_ignores_scale_and_is_odd(form, seed, shape, factor):
    x, g, _, _ = draw(seed, shape)
    same = form.rms_norm(Tensor(x * factor), Tensor(g), eps=1e-30).data
    np.testing.assert_allclose(same, np.sign(factor) * form.rms_norm(Tensor(x), Tensor(g), eps=1e-30).data, rtol=1e-10)


@BOTH
@pytest.mark.equation("rmsnorm")
@given(seeds, shapes)
def test_rms_norm_gradient_is_orthogonal_to_the_input(form, seed, shape):
    x, g, _, dy = draw(seed, shape)
    dx, _ = pull(lambda x, g: form.rms_norm(x, g, eps=1e-30), x, g, cotangent=dy)
    np.testing.assert_allclose((dx * x).sum(-1), 0, atol=1e-9 * max(1, np.abs(dx).max()))


@BOTH
@pytest.mark.equation("rmsnorm")
def test_a_row_of_zeros_gives_zeros_and_finite_gradients(form):
    dx, dg = pull(form.rms_norm, np.zeros((2, 5)), np.ones(5), cotangent=np.ones((2, 5)))
    assert np.isfinite(dx).all() and not dg.any()
    assert not form.rms_norm(Tensor(np.zeros((2, 5))), Tensor(np.ones(5))).data.any()


@BOTH
@pytest.mark.equation("layernorm", "layernorm-backward")
@given(seeds, shapes)
def test_layer_norm_gradient_is_orthogonal_to_ones_and_to_the_normalised_input(form, seed, shape):
    x, g, b, dy = draw(seed, shape)
    dx, _, db = pull(lambda *a: form.layer_norm(*a, eps=1e-12), x, g, b, cotangent=dy)
    size = max(1.0, np.abs(dx).max())
    np.testing.assert_allclose(dx.sum(-1), 0, atol=1e-9 * size * shape[-1])
    if shape[-1] > 2:
        np.testing.assert_allclose((dx * (x - x.mean(-1, keepdims=True))).sum(-1), 0, atol=1e-6 * size)
    np.testing.assert_allclose(db, dy.reshape(-1, shape[-1]).sum(0))


@BOTH
@pytest.mark.equation("layernorm")
def test_the_root_is_of_the_variance(form):
    """Erratum 10: the root of the standard deviation would leave data of spread 10 with spread 3.2."""
    x = np.random.default_rng(1).normal(scale=10, size=(50, 2000))
    y = form.layer_norm(Tensor(x), Tensor(np.ones(2000)), Tensor(np.zeros(2000))).data
    assert y.std(-1).mean() == pytest.approx(1.0, abs=1e-3)
    wrong = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.std(-1, keepdims=True))
    assert wrong.std(-1).mean() == pytest.approx(np.sqrt(10), rel=0.02)


@pytest.mark.equation("wn-layernorm-eps")
def test_default_eps_of_layer_norm():
    for form in (written.layer_norm, derived.layer_norm):
        assert inspect.signature(form).parameters["eps"].default == 1e-5


@pytest.mark.equation("rmsnorm-layernorm-relation")
def test_layer_norm_is_rms_norm_of_the_centred_input():
    x, g, _, _ = draw(3, (6, 17))
    left = written.layer_norm(Tensor(x), Tensor(g), Tensor(np.zeros(17)), eps=1e-5).data
    right = written.rms_norm_of_centred(Tensor(x), Tensor(g), eps=1e-5).data
    np.testing.assert_allclose(left, right, atol=3e-15)


@pytest.mark.equation("rmsnorm-mean-shift")
def test_no_constant_bias_absorbs_the_mean():
    """Erratum 12: the identity holds token by token, and the mean differs between tokens."""
    rng = np.random.default_rng(0)
    y, w, b = rng.normal(size=(200, 16)), rng.normal(size=(16, 16)), rng.normal(size=16)
    mean, rest = written.split_mean_shift(Tensor(y), Tensor(w), Tensor(b))
    np.testing.assert_allclose((mean + rest).data, y @ w.T + b, atol=1e-12)
    shift = mean.data - b
    assert np.linalg.norm(shift - shift.mean(0)) > 0.5 * np.linalg.norm(shift)


@pytest.mark.equation("layernorm", "rmsnorm")
@given(seeds, shapes)
def test_torch_agrees(seed, shape):
    x, g, b, dy = draw(seed, shape)
    tx, tg, tb = (torch.tensor(a, requires_grad=True) for a in (x, g, b))
    for ours, theirs, args, ts in [
        (derived.layer_norm, torch.nn.functional.layer_norm(tx, shape[-1:], tg, tb, 1e-5), (x, g, b), (tx, tg, tb)),
        (derived.rms_norm, torch.nn.functional.rms_norm(tx, shape[-1:], tg, 1e-6), (x, g), (tx, tg)),
    ]:
        np.testing.assert_allclose(ours(*map(Tensor, args)).data, theirs.detach().numpy(), rtol=1e-9, atol=1e-11)
        for a, b_ in zip(
            pull(ours, *args, cotangent=dy), torch.autograd.grad(theirs, ts, torch.tensor(dy)), strict=True
        ):
            np.testing.assert_allclose(a, b_.numpy(), rtol=1e-7, atol=1e-9)


@BOTH
@pytest.mark.equation("pre-ln")
@given(seeds, shapes)
def test_add_rms_norm_is_addition_then_norm(form, seed, shape):
    x, g, _, r = draw(seed, shape)
    s, y = form.add_rms_norm(Tensor(x), Tensor(r), Tensor(g))
    np.testing.assert_array_equal(s.data, x + r)
    np.testing.assert_allclose(y.data, written.rms_norm(Tensor(x + r), Tensor(g)).data, rtol=1e-12, atol=1e-14)


@pytest.mark.equation("pre-ln", "post-ln")
def test_pre_norm_stream_grows_and_post_norm_stream_does_not():
    """Erratum 13: only the inputs of the branches are normalised; the stream itself grows about linearly."""
    rng = np.random.default_rng(0)
    d, pre = 256, Tensor(rng.normal(size=(64, 256)))
    post, variances = pre, {}
    g = Tensor(np.ones(d))
    for n in range(1, 25):
        w = Tensor(rng.normal(size=(d, d)) / np.sqrt(d))
        pre = written.pre_norm_residual(pre, lambda x, w=w: x @ w, g)
        post = written.post_norm_residual(post, lambda x, w=w: x @ w, g)
        variances[n] = (pre.data.var(), post.data.var())
    for n in (1, 6, 12, 24):
        assert variances[n][0] == pytest.approx(n + 1, rel=0.15)
        assert variances[n][1] == pytest.approx(1.0, rel=0.01)


@BOTH
def test_wrong_shapes_are_refused_with_both_shapes_named(form):
    with pytest.raises(ValueError, match=r"rms_norm: the gain g must be of shape \(4,\), got shape \(3,\)"):
        form.rms_norm(Tensor(np.ones((2, 4))), Tensor(np.ones(3)))
    with pytest.raises(ValueError, match="the shift b"):
        form.layer_norm(Tensor(np.ones((2, 4))), Tensor(np.ones(4)), Tensor(np.ones(5)))
    with pytest.raises(ValueError, match="the branch r"):
        form.add_rms_norm(Tensor(np.ones((2, 4))), Tensor(np.ones((1, 4))), Tensor(np.ones(4)))
