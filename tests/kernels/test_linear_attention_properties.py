"""Linear attention against the NumPy reference, by property; and the same in all forms: written, derived, fast."""

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.evaluate import evaluate
from kernels.linear_attention import op
from kernels.problem import to_array
from minillm.functional import linear_attention as written
from minillm.fused import linear_attention as derived

pytestmark = [
    pytest.mark.equation("linear-attention", "linear-attention-causal", "feature-map-elu1"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_linear_attention_gpu.py"),
]
PROPERTIES = {prop.name: prop for prop in registry.load("linear_attention").PROPERTIES}


def check(names, examples, dtypes=None):
    outcomes = compare.compare("linear_attention", examples=examples, number=0, properties=names, dtypes=dtypes)
    assert outcomes
    print(compare.report(outcomes))
    assert all(outcome.passed for outcome in outcomes), compare.report([o for o in outcomes if not o.passed])


@pytest.mark.quick
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    check([name], examples=3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_properties_on_many_examples(dtype):
    """In one call, so that what several properties look at is computed once."""
    check(list(PROPERTIES), 5, dtypes=[dtype])


def test_written_derived_and_fast_agree():
    """One function in three forms: values and gradients, in float32, on one draw."""
    rng = np.random.default_rng(0)
    shapes = [(2, 2, 19, 5), (2, 2, 19, 5), (2, 2, 19, 7), (2, 2, 5, 7), (2, 2, 5)]
    arrays = [rng.uniform(0.1, 1.0, shape).astype(np.float32) for shape in shapes]
    seeds = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 2, 19, 7), (2, 2, 5, 7), (2, 2, 5))]
    a = evaluate(written.linear_attention_chunked, arrays, seeds, np.float32, chunk=4)
    b = evaluate(derived.linear_attention_chunked, arrays, seeds, np.float32, chunk=8)
    tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
    outputs = op.linear_attention(*tensors)
    gradients = torch.autograd.grad(outputs, tensors, [torch.from_numpy(s) for s in seeds])
    fast = [to_array(t) for t in (*outputs, *gradients)]
    for x, y, z in zip([*a[0], *a[1]], [*b[0], *b[1]], fast, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(x, z, rtol=1e-5, atol=2e-5)
