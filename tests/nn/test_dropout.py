"""Dropout and DropPath as modules: the switch, the law of the mask, gradients, and bad input."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.nn.dropout import Dropout, DropPath


@pytest.mark.equation("dropout")
def test_without_a_generator_dropout_is_the_identity_and_with_one_the_mean_stays():
    x = Tensor(np.ones((400, 100), np.float32), requires_grad=True)
    layer = Dropout(0.3)
    assert layer(x) is x and Dropout(0.0)(x, np.random.default_rng(0)) is x
    y = layer(x, np.random.default_rng(0))
    assert y.dtype == np.float32 and set(np.unique(y.data)) == {np.float32(0), np.float32(1 / 0.7)}
    five_errors = 5 * np.sqrt(0.3 / 0.7 / x.size)
    assert abs(y.data.mean() - 1) < five_errors
    np.testing.assert_array_equal(grad([y.sum()], [x])[0].data, y.data)  # the same entries, the same factor
    np.testing.assert_array_equal(layer(x, np.random.default_rng(0)).data, y.data)  # repeatable


@pytest.mark.equation("droppath")
def test_droppath_keeps_or_leaves_whole_sequences():
    rng = np.random.default_rng(1)
    x, branch = (Tensor(rng.normal(size=(200, 3, 2)), requires_grad=True) for _ in range(2))
    layer = DropPath(0.25)
    np.testing.assert_array_equal(layer(x, branch).data, x.data + branch.data)
    added = (layer(x, branch, np.random.default_rng(2)).data - x.data) / branch.data
    assert (np.ptp(added, axis=(1, 2)) < 1e-9).all()  # one factor a sequence
    kept = added[:, 0, 0] > 0.5
    np.testing.assert_allclose(added[:, 0, 0], np.where(kept, 1 / 0.75, 0), atol=1e-9)
    assert 0 < kept.sum() < 200
    gradient = grad([layer(x, branch, np.random.default_rng(2)).sum()], [branch])[0].data
    np.testing.assert_allclose(gradient, np.broadcast_to(added, gradient.shape), atol=1e-9)


@pytest.mark.parametrize("kind", [Dropout, DropPath])
@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_outside_the_interval_is_refused(kind, rate):
    with pytest.raises(ValueError, match=f"{kind.__name__}: .*must be"):
        kind(rate)
