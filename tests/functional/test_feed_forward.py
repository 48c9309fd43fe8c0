"""Activations, feed-forward networks, dropout: torch's own, relations, the figures of the sources, bad input."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.autograd import Tensor, grad
from minillm.functional import activation_family as family
from minillm.functional import dropout as drop
from minillm.functional import feed_forward as ff
from minillm.functional.activations import geglu, gelu, swiglu
from minillm.functional.attention import scaled_dot_product_attention

F = torch.nn.functional
THEIRS = {
    "relu": F.relu, "relu_squared": lambda x: F.relu(x) ** 2, "gelu": F.gelu, "silu": F.silu, "swish": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "softplus": F.softplus, "elu": F.elu, "leaky_relu": F.leaky_relu, "mish": F.mish, "identity": lambda x: x,
}  # fmt: skip


def slope_of(y: Tensor, x: Tensor) -> np.ndarray:
    (slope,) = grad([y], [x], [np.ones(y.shape)])
    return slope.data


@pytest.mark.equation("relu", "relu-squared", "swish-beta", "sigmoid", "softplus", "elu", "activation-zoo")
@pytest.mark.parametrize("name", family.ACTIVATIONS)
def test_torch_agrees_in_value_and_slope_far_out_too(name):
    x = np.concatenate([np.linspace(-6, 6, 101) + 0.003, [-800.0, -40.0, 40.0, 800.0]])
    ours, theirs = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, y_theirs = family.activation(name)(ours), THEIRS[name](theirs)
    np.testing.assert_allclose(y.data, y_theirs.detach().numpy(), rtol=1e-9, atol=1e-12)
    (slope,) = torch.autograd.grad(y_theirs.sum(), theirs)
    np.testing.assert_allclose(slope_of(y, ours), slope.numpy(), rtol=1e-7, atol=1e-9)


@pytest.mark.equation("gelu")
@given(st.floats(-5, 5).filter(lambda x: abs(x) > 1e-3))
def test_gelu_is_the_input_times_the_distribution_function(x):
    """Erratum 15: GELU(x) / x is the Gaussian distribution function; GELU does not approximate it."""
    assert gelu(Tensor(np.array(x))).item() / x == pytest.approx(scipy.stats.norm.cdf(x), rel=1e-9)


@pytest.mark.equation("swish-beta")
def test_swish_goes_from_half_the_input_to_relu():
    x = np.linspace(-3, 3, 61)
    np.testing.assert_allclose(family.swish(Tensor(x), 0.0).data, x / 2)
    np.testing.assert_allclose(family.swish(Tensor(x), 1e3).data, np.maximum(x, 0), atol=1e-12)


@pytest.mark.equation("sigmoid", "activation-zoo")
def test_saturated_units_have_no_slope():
    x = Tensor(np.array([-30.0, 30.0]), requires_grad=True)
    for name in ("sigmoid", "tanh"):
        assert np.abs(slope_of(family.activation(name)(x), x)).max() < 1e-12
    y = family.activation("sigmoid")(x)
    np.testing.assert_allclose(slope_of(y, x), y.data * (1 - y.data), atol=1e-15)


@pytest.mark.equation("dead-relu")
def test_dead_units_are_those_that_never_fire():
    h = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    assert family.dead_share(h) == 0.5
    rng = np.random.default_rng(0)
    pre = rng.normal(size=(500, 200)) - np.linspace(0, 6, 200)
    shares = [family.dead_share(np.maximum(pre - s, 0)) for s in (0, 1, 2)]
    assert 0 < shares[0] < shares[1] < shares[2] < 1


@pytest.mark.equation("ffn")
@pytest.mark.parametrize("act", ["relu", "gelu", "silu"])
def test_positions_do_not_interact(act):
    rng = np.random.default_rng(1)
    x, *weights = (rng.normal(size=s) for s in ((2, 5, 3), (7, 3), (7,), (3, 7), (3,)))
    y = ff.ffn(*map(Tensor, (x, *weights)), act=act).data
    order = rng.permutation(5)
    np.testing.assert_allclose(ff.ffn(*map(Tensor, (x[:, order], *weights)), act=act).data, y[:, order], rtol=1e-12)
    w_1, b_1, w_2, b_2 = map(torch.tensor, weights)
    theirs = F.linear(THEIRS[act](F.linear(torch.tensor(x), w_1, b_1)), w_2, b_2)
    np.testing.assert_allclose(y, theirs.numpy(), rtol=1e-12)


@pytest.mark.equation("glu", "reglu-bilinear", "swiglu", "geglu", "glu-split", "glu-ffn")
def test_two_maps_are_one_map_in_halves_for_every_gate():
    """Erratum 18: as a network it needs a way back to the model's width."""
    rng = np.random.default_rng(2)
    x, w_v, w_g, w_down = (Tensor(rng.normal(size=s)) for s in ((2, 3, 4), (6, 4), (6, 4), (4, 6)))
    joint = x @ Tensor(np.concatenate([w_v.data, w_g.data])).T
    np.testing.assert_allclose(ff.glu(x, w_v, w_g, act="silu").data, swiglu(joint).data, rtol=1e-12)
    np.testing.assert_allclose(ff.glu(x, w_v, w_g, act="gelu").data, geglu(joint).data, rtol=1e-12)
    np.testing.assert_allclose(ff.glu(x, w_v, w_g).data, F.glu(torch.tensor(joint.data)).numpy(), rtol=1e-12)
    value, gate = joint.data[..., :6], joint.data[..., 6:]
    np.testing.assert_allclose(ff.glu(x, w_v, w_g, act="identity").data, value * gate, rtol=1e-12)
    np.testing.assert_allclose(ff.glu(x, w_v, w_g, act="relu").data, value * np.maximum(gate, 0), rtol=1e-12)
    for kind, act in ff.GATES.items():
        out = ff.glu_ffn(x, w_v, w_g, w_down, kind)
        assert out.shape == x.shape
        np.testing.assert_allclose(out.data, ff.glu(x, w_v, w_g, act=act).data @ w_down.data.T, rtol=1e-12)


@pytest.mark.equation("swiglu", "glu")
def test_bias_free_is_what_the_totals_of_llama_need():
    """Erratum 7: with three biases a layer of 13B would have 32,768 parameters more."""
    weights, biases = 3 * 5120 * 13824, 13824 + 13824 + 5120
    assert weights == 212_336_640 and biases == 32_768


@pytest.mark.equation("llama-ffn-rounding", "wn-ffn-rounding")
def test_inner_widths_of_the_llama_table():
    assert [ff.llama_width(d) for d in (4096, 5120, 6656, 8192)] == [11008, 13824, 17920, 22016]
    assert ff.llama_width(8192, 4096, 1.3) == 28672 and ff.llama_width(4096, 1024, 1.3) == 14336


@pytest.mark.equation("ffn-expansion", "wn-ratio-13b", "wn-ffn-ratio", "wn-dff-2.4")
def test_expansion_ratios():
    """Erratum 16: neither 2 nor "around 2.4", but 8/3 rounded up, and 3.5 with the multiplier."""
    assert ff.expansion(2048, 512) == 4
    assert (ff.expansion(11008, 4096), ff.expansion(13824, 5120), ff.expansion(28672, 8192)) == (2.6875, 2.7, 3.5)
    assert all(2 <= ff.expansion(ff.llama_width(d), d) <= 4 for d in (512, 4096, 5120, 6656, 8192))


@pytest.mark.equation("glu-param-parity")
def test_two_thirds_of_the_width_make_a_gated_network_as_large():
    assert 3 * 512 * ff.parity_width(2048) == 2 * 512 * 2048
    assert ff.parity_width(4 * 96) / 96 == pytest.approx(8 / 3)


@pytest.mark.equation("ffn-share", "wn-ffn-share")
def test_shares_of_the_feed_forward_networks():
    """Erratum 17: from 45 to 82 %."""

    def llama(d, layers, d_ff, kv, heads, V):
        ffn_size = 3 * d * d_ff
        total = 2 * V * d + layers * (2 * d * d + 2 * d * kv * (d // heads) + ffn_size + 2 * d) + d
        return 100 * ff.ffn_share(layers, ffn_size, total)

    def gpt2(d, layers, V=50257, context=1024):
        return 100 * ff.ffn_share(
            layers, 8 * d * d + 5 * d, V * d + context * d + layers * (12 * d * d + 13 * d) + 2 * d
        )

    assert gpt2(768, 12) == pytest.approx(45.5, abs=0.06) and gpt2(1600, 48) == pytest.approx(63.1, abs=0.06)
    assert gpt2(12288, 96, context=2048) == pytest.approx(66.4, abs=0.06)
    for shape, wanted in (
        ((4096, 32, 11008, 32, 32, 32000), 64.2), ((5120, 40, 13824, 40, 40, 32000), 65.3),
        ((8192, 80, 22016, 64, 64, 32000), 66.3), ((4096, 32, 14336, 8, 32, 128256), 70.2),
        ((8192, 80, 28672, 8, 64, 32000), 81.7),
    ):  # fmt: skip
        assert llama(*shape) == pytest.approx(wanted, abs=0.06)


@pytest.mark.equation("attention-linear-in-values")
def test_attention_is_linear_for_fixed_weights_only():
    rng = np.random.default_rng(3)
    A, V, U = rng.dirichlet(np.ones(5), size=(2, 4)), rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 3))
    mixed = ff.apply_fixed_attention(Tensor(A), Tensor(2 * V + U)).data
    apart = [ff.apply_fixed_attention(Tensor(A), Tensor(X)).data for X in (V, U)]
    np.testing.assert_allclose(mixed, 2 * apart[0] + apart[1], rtol=1e-12)
    x = Tensor(rng.normal(size=(1, 1, 4, 3)))
    twice = x * 2.0
    assert not np.allclose(
        scaled_dot_product_attention(twice, twice, twice).data, 2 * scaled_dot_product_attention(x, x, x).data
    )


@pytest.mark.equation("rank-collapse")
def test_pure_attention_collapses_and_additions_prevent_it():
    pure = np.mean([ff.collapse_by_depth(12, 16, 8, np.random.default_rng(s)) for s in range(5)], axis=0)
    skip = np.mean([ff.collapse_by_depth(12, 16, 8, np.random.default_rng(s), skip=True) for s in range(5)], axis=0)
    assert pure[0] > 0.9 and pure[4] < 1e-2 and (np.diff(pure[:4]) < 0).all()
    assert skip[-1] > 0.2


@pytest.mark.equation("dropout")
def test_dropout_keeps_the_mean_and_the_zeros():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(4, 5))
    assert drop.dropout(Tensor(x), None, 0.3).data is x or np.array_equal(drop.dropout(Tensor(x), None, 0.3).data, x)
    kept = drop.draw_kept((200_000, 2), 0.3, rng)
    assert kept.mean() == pytest.approx(0.7, abs=0.005)
    y = drop.dropout(Tensor(np.ones((200_000, 2))), kept, 0.3).data
    assert set(np.unique(y)) == {0.0, 1 / 0.7} and y.mean() == pytest.approx(1, abs=0.01)


@pytest.mark.equation("droppath")
def test_droppath_drops_branches_of_whole_sequences():
    rng = np.random.default_rng(5)
    x, branch = Tensor(rng.normal(size=(3, 2, 4))), Tensor(rng.normal(size=(3, 2, 4)))
    np.testing.assert_array_equal(drop.droppath(x, branch, None, 0.5).data, (x + branch).data)
    kept = np.array([True, False, True])
    y = drop.droppath(x, branch, kept, 0.5).data
    np.testing.assert_array_equal(y[1], x.data[1])
    np.testing.assert_allclose(y[[0, 2]], (x.data + 2 * branch.data)[[0, 2]])
    mean = np.mean([drop.droppath(x, branch, drop.draw_kept((3,), 0.5, rng), 0.5).data for _ in range(4000)], axis=0)
    np.testing.assert_allclose(mean, (x + branch).data, atol=0.15)


x3 = Tensor(np.ones((2, 3)))
bad = [
    (lambda: family.activation("softsign"), "activation: the name must be one of 'relu'"),
    (lambda: family.swish(x3, -1.0), "swish: beta must be a non-negative number, got -1.0"),
    (lambda: family.elu(x3, 0.0), "elu: alpha must be a positive number, got 0.0"),
    (lambda: family.leaky_relu(x3, -0.1), r"leaky_relu: a must be in \[0, 1\], got -0.1"),
    (lambda: family.leaky_relu(x3, 2.0), r"leaky_relu: a must be in \[0, 1\], got 2.0"),
    (lambda: family.dead_share(np.zeros((0, 3))), "dead_share: h must be of shape"),
    (lambda: ff.ffn(x3, Tensor(np.ones((4, 2))), None, Tensor(np.ones((3, 4))), None), "the last axis of x must be d_in = 2 long"),
    (lambda: ff.glu_ffn(x3, *(Tensor(np.ones((4, 3))),) * 2, Tensor(np.ones((3, 4))), "softglu"), "glu_ffn: the kind must be one of glu, swiglu"),
    (lambda: ff.llama_width(0), "llama_width: d must be a positive integer, got 0"),
    (lambda: ff.llama_width(8, 0), "multiple_of must be a positive integer, got 0"),
    (lambda: ff.parity_width(-4), "parity_width: d_ff must be a positive integer, got -4"),
    (lambda: ff.expansion(4, 0), "expansion: d_model must be a positive integer, got 0"),
    (lambda: ff.ffn_share(3, 5, 14), "ffn_share: the networks' parameters must be at most 14, got 15"),
    (lambda: ff.rank_residual(np.zeros((2, 2))), "rank_residual: X must be a matrix"),
    (lambda: ff.collapse_by_depth(3, 0, 2, np.random.default_rng(0)), "collapse_by_depth: d must be a positive integer"),
    (lambda: drop.dropout(x3, None, 1.0), r"dropout: the rate must be in \[0, 1\), got 1.0"),
    (lambda: drop.dropout(x3, np.ones(3, bool), 0.1), r"dropout: the mask must be boolean of shape \(2, 3\)"),
    (lambda: drop.draw_kept((2,), -0.1, np.random.default_rng(0)), "draw_kept: the rate must be"),
    (lambda: drop.droppath(x3, Tensor(np.ones((2, 2))), None, 0.1), "droppath: the branch must be of shape"),
    (lambda: drop.droppath(x3, x3, np.ones(3, bool), 0.1), r"droppath: the mask must be boolean of shape \(2,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), bad)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
