"""Feed-forward networks and norms as modules: every kind against its equation, and bad input."""

import numpy as np
import pytest
import torch

from minillm.autograd import Tensor, grad
from minillm.functional import feed_forward as ff
from minillm.nn.ffn import KINDS, FeedForward
from minillm.nn.norms import LayerNorm, make_norm


def stream(rng, *shape):
    return Tensor(rng.normal(size=shape).astype(np.float32), requires_grad=True)


@pytest.mark.equation("ffn", "glu-ffn", "reglu-bilinear", "glu-split")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_equation_with_a_gradient_for_every_parameter(kind, bias):
    rng = np.random.default_rng(0)
    net, x = FeedForward(6, 10, kind, rng, bias=bias, std=0.5), stream(rng, 2, 3, 6)
    for b in (net.b_in, net.b_down):
        if b is not None:
            b.data[...] = rng.normal(size=b.shape)
    y = net(x)
    if kind in ff.GATES:
        (w_v, w_g), (b_v, b_g) = (
            np.split(net.w_in.data, 2),
            (None, None) if net.b_in is None else map(Tensor, np.split(net.b_in.data, 2)),
        )
        hidden = ff.glu(x, Tensor(w_v), Tensor(w_g), b_v, b_g, act=ff.GATES[kind])
        wanted = (hidden @ net.w_down.T).data + (0 if net.b_down is None else net.b_down.data)
    else:
        wanted = ff.ffn(x, net.w_in, net.b_in, net.w_down, net.b_down, act=kind).data
    np.testing.assert_allclose(y.data, wanted, rtol=2e-5, atol=2e-6)
    parameters = net.parameters()
    assert len(parameters) == (4 if bias else 2)
    for gradient in grad([y], parameters, [rng.normal(size=y.shape).astype(np.float32)]):
        assert np.isfinite(gradient.data).all() and gradient.data.any()


@pytest.mark.equation("layernorm", "wn-layernorm-eps")
def test_torch_agrees_on_layer_norm():
    rng = np.random.default_rng(1)
    ours, theirs, x = LayerNorm(7), torch.nn.LayerNorm(7), stream(rng, 4, 7)
    assert ours.eps == theirs.eps == 1e-5
    gain, shift = rng.normal(size=7).astype(np.float32), rng.normal(size=7).astype(np.float32)
    ours.gain.data[...], ours.shift.data[...] = gain, shift
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(gain))
        theirs.bias.copy_(torch.tensor(shift))
    np.testing.assert_allclose(ours(x).data, theirs(torch.tensor(x.data)).detach().numpy(), atol=2e-6)
    assert type(make_norm("layernorm", 3, 1e-5)) is LayerNorm and make_norm("rmsnorm", 3, 1e-5).eps == 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeedForward(4, 8, "swoosh", np.random.default_rng(0)), "FeedForward: kind must be one of 'relu'"),
        (lambda: FeedForward(4, 0, "relu", np.random.default_rng(0)), "FeedForward: d_ff must be a positive integer, got 0"),
        (lambda: LayerNorm(0), "LayerNorm: d must be a positive integer, got 0"),
        (lambda: LayerNorm(3, 0.0), "LayerNorm: eps must be a positive number, got 0.0"),
        (lambda: make_norm("batchnorm", 3, 1e-5), "make_norm: norm must be one of 'rmsnorm', 'layernorm', got batchnorm"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
