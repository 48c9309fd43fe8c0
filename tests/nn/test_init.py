"""Initial weights have the spread that the equations ask for, and it does what it is for."""

import numpy as np
import pytest

from minillm.autograd import no_grad
from minillm.models import Config, Decoder
from minillm.nn.init import kaiming_normal, xavier_normal


def assert_normal_with_std(weights: np.ndarray, std: float) -> None:
    n = weights.size
    # The sample variance of n normals has relative spread sqrt(2 / n), their mean std / sqrt(n): five of them.
    assert abs(weights.var() / std**2 - 1) < 5 * np.sqrt(2 / n)
    assert abs(weights.mean()) < 5 * std / np.sqrt(n)


@pytest.mark.equation("init-schemes")
@pytest.mark.parametrize("layers", [1, 4, 9])
def test_a_decoder_starts_with_std_002_and_residual_outputs_with_less(layers):
    model = Decoder(Config(400, 128, layers, 4), np.random.default_rng(0))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            np.testing.assert_array_equal(parameter.data, 1)
        else:
            residual = name.endswith(("w_out", "w_down"))
            assert_normal_with_std(parameter.data, 0.02 / np.sqrt(2 * layers) if residual else 0.02)


@pytest.mark.equation("init-schemes")
def test_xavier_and_kaiming_have_their_variances():
    rng = np.random.default_rng(0)
    assert xavier_normal(30, 70, rng).shape == (70, 30)
    assert_normal_with_std(xavier_normal(300, 700, rng), np.sqrt(2 / 1000))
    assert_normal_with_std(kaiming_normal(300, 700, rng), np.sqrt(2 / 300))


@pytest.mark.equation("init-schemes")
def test_kaiming_keeps_a_signal_alive_through_forty_relu_layers_and_xavier_does_not():
    rng, n = np.random.default_rng(0), 256
    sizes = {}
    for scheme in (kaiming_normal, xavier_normal):
        x = rng.normal(size=(n, 64))
        for _ in range(40):
            x = np.maximum(scheme(n, n, rng) @ x, 0)
        sizes[scheme] = np.sqrt((x**2).mean())
    assert 0.2 < sizes[kaiming_normal] < 5
    assert sizes[xavier_normal] < 1e-4  # half of the mean square is lost in every layer: 2^-20


@pytest.mark.equation("init-schemes")
def test_residual_output_maps_keep_the_stream_from_growing_with_depth():
    """The branches' share of the stream's variance is the same for 2 and 18 layers, and 9 times as large without."""

    def variance_of_branches(layers: int, rescaled: bool) -> float:
        model = Decoder(Config(50, 64, layers, 4), np.random.default_rng(1))
        with no_grad():
            x = start = model.embedding(np.arange(50)[None])  # (1, 50, d_model)
            for block in model.blocks:
                if not rescaled:
                    for weight in (block.attention.w_out, block.ffn.w_down):
                        weight.data *= np.sqrt(2 * layers)
                x = x + block.attention(block.attention_norm(x), model._angles[:50])
                x = x + block.ffn(block.ffn_norm(x))
        return float((x - start).data.var())

    assert 0.5 < variance_of_branches(18, True) / variance_of_branches(2, True) < 2
    assert variance_of_branches(18, False) / variance_of_branches(2, False) > 4.5


@pytest.mark.parametrize("scheme", [xavier_normal, kaiming_normal])
def test_sizes_must_be_positive(scheme):
    with pytest.raises(ValueError, match="d_in must be a positive integer, got 0"):
        scheme(0, 3, np.random.default_rng(0))
