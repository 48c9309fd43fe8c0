"""The linear mixer: cached equals uncached, padding is not heard, other lengths and heads work."""

import numpy as np
import pytest

from minillm.autograd import Tensor, no_grad
from minillm.functional.feature_maps import FEATURE_MAPS
from minillm.nn.linear_attention import LinearAttention


def layer(**how) -> LinearAttention:
    return LinearAttention(8, 4, np.random.default_rng(0), std=0.4, **how)


def text(L: int = 11, seed: int = 1) -> Tensor:
    return Tensor(np.random.default_rng(seed).normal(size=(2, L, 8)).astype(np.float32))


@pytest.mark.equation("linear-attention-causal")
@pytest.mark.parametrize("features", list(FEATURE_MAPS))
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_with_its_running_sums_it_goes_on_as_if_it_had_seen_all_at_once(features, n_kv_heads):
    mixer, x = layer(features=features, n_kv_heads=n_kv_heads, chunk=4), text()
    cache = mixer.new_cache(2)
    before = cache.nbytes
    with no_grad():
        whole = mixer(x).data
        parts = [mixer(x[:, a:b], cache=cache).data for a, b in ((0, 5), (5, 6), (6, 11))]
    # Fourier features are signed, so that a normaliser near 0 magnifies rounding
    tolerance = 1e-2 if features == "fourier" else 1e-4
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=tolerance, atol=tolerance)
    assert cache.length == 11 and cache.nbytes == before


@pytest.mark.equation("linear-attention")
def test_padding_is_not_heard_and_a_memory_may_have_another_length():
    mixer, x, memory = layer(causal=False), text(3), text(6, seed=2)
    keep = np.ones((2, 1, 1, 6), bool)
    keep[..., 4:] = False
    changed = memory.data.copy()
    changed[:, 4:] = 9
    a, b = mixer(x, memory=memory, keep=keep), mixer(x, memory=Tensor(changed), keep=keep)
    np.testing.assert_array_equal(a.data, b.data)
    np.testing.assert_allclose(a.data, mixer(x, memory=memory[:, :4]).data, rtol=1e-4, atol=1e-6)
    assert np.abs(a.data - mixer(x, memory=memory).data).max() > 1e-4


@pytest.mark.equation("linear-attention-causal")
def test_every_weight_gets_a_gradient_and_positions_are_passed_on():
    seen = []
    mixer = layer(turn=lambda heads, at: seen.append(np.asarray(at).tolist()) or heads)
    (mixer(text(3)) ** 2).sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    mixer(text(3), positions=np.array([4, 5, 6]))
    assert seen == [[0, 1, 2]] * 2 + [[4, 5, 6]] * 2


BAD = {
    "heads": (lambda: LinearAttention(8, 3, np.random.default_rng(0)), "n_heads must be a divisor of d_model = 8"),
    "kv heads": (lambda: layer(n_kv_heads=3), "n_kv_heads must be a divisor of n_heads = 4, got 3"),
    "features": (lambda: layer(features="cosine"), "kind must be one of 'elu1'"),
    "chunk": (lambda: layer(chunk=0), "chunk must be a positive integer, got 0"),
    "x": (lambda: layer()(text()[..., :4]), r"x must be of shape \(B, L, 8\)"),
    "bias": (lambda: layer()(text(), bias=np.ones((11, 11))), "the bias must be None"),
    "memory": (lambda: layer()(text(), memory=text()), "the memory must be None in a causal layer"),
    "keep": (lambda: layer()(text(), keep=np.ones((11, 11), bool)), r"the mask must be one of padding, .*\(2, 1, 1, 11\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        call()
