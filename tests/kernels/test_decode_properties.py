"""Decoding against the NumPy reference, by property; and against minillm's own caches."""

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.decode import op
from kernels.problem import to_array
from minillm.autograd import Tensor, no_grad
from minillm.functional.attention import scaled_dot_product_attention
from minillm.nn.cache import LayerCache

pytestmark = [
    pytest.mark.equation("kv-cache", "flash-attention", "gqa", "mqa", "sparse-attention-window", "mla-absorb"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_decode_gpu.py"),
]
PROPERTIES = {prop.name: prop for prop in registry.load("decode").PROPERTIES}


def check(names, examples, dtypes=None):
    outcomes = compare.compare("decode", examples=examples, number=0, properties=names, dtypes=dtypes)
    assert outcomes
    print(compare.report(outcomes))
    assert all(outcome.passed for outcome in outcomes), compare.report([o for o in outcomes if not o.passed])


@pytest.mark.quick
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    check([name], examples=4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_properties_on_many_examples(dtype):
    """In one call, so that what several properties look at is computed once."""
    check(list(PROPERTIES), 7, dtypes=[dtype])


def test_generation_step_by_step_equals_minillm():
    """minillm's cache and attention, and ours, fed the same tokens one after the other."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, H, 6, 8)).astype(np.float32) for H in (4, 2, 2))
    cache, ours = LayerCache(2, 2, 8, 8), op.DecodeAttention(2, 2, 8, 8)
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        new = [x[:, :, start:stop] for x in (q, k, v)]
        with no_grad():
            keys, values = cache.append(Tensor(new[1]), Tensor(new[2]))
            expected = scaled_dot_product_attention(Tensor(new[0]), keys, values, causal=True)
        o = ours(*(torch.from_numpy(np.ascontiguousarray(x)) for x in new))
        np.testing.assert_allclose(to_array(o), expected.numpy(), atol=2e-6)
