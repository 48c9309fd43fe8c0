"""The norms against the NumPy reference, by property; and the same in all forms: written, derived, fast."""

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.evaluate import evaluate
from kernels.norm import op, problems
from kernels.problem import to_array
from minillm.functional import norms as written
from minillm.fused import norms as derived

pytestmark = [
    pytest.mark.equation("rmsnorm", "layernorm", "layernorm-backward", "rmsnorm-layernorm-relation", "pre-ln"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_norm_gpu.py"),
]
PROPERTIES = {prop.name: prop for prop in registry.load("norm").PROPERTIES}


def check(names, examples, dtypes=None):
    outcomes = compare.compare("norm", examples=examples, number=0, properties=names, dtypes=dtypes)
    assert outcomes
    print(compare.report(outcomes))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    assert not failed, compare.report(failed)


@pytest.mark.quick
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    check([name], examples=6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_properties_on_many_examples(dtype):
    """In one call, so that what several properties look at is computed once."""
    check(list(PROPERTIES), 12, dtypes=[dtype])


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm"])
def test_written_derived_and_fast_agree(rng, name):
    """One function in three forms: value and gradient, in float32, on one draw."""
    shape = (3, 17)
    arrays = [
        rng.standard_normal(shape if n in "xr" else shape[-1:]).astype(np.float32) for n in problems.OPERANDS[name]
    ]
    seeds = [rng.standard_normal(shape).astype(np.float32) for _ in problems.outputs_of(name)]
    a = evaluate(getattr(written, name), arrays, seeds, np.float32, eps=1e-5)
    b = evaluate(getattr(derived, name), arrays, seeds, np.float32, eps=1e-5)
    tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
    outputs = getattr(op, name)(*tensors, eps=1e-5)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, tensors, [torch.from_numpy(s) for s in seeds])
    fast = [to_array(t) for t in (*outputs, *gradients)]
    for x, y, z in zip([*a[0], *a[1]], [*b[0], *b[1]], fast, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
        np.testing.assert_allclose(x, z, rtol=0, atol=2e-5)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.equation("rmsnorm-layernorm-relation")
def test_layer_norm_is_rms_norm_of_the_centred_row(rng):
    x = torch.from_numpy(rng.standard_normal((4, 33)).astype(np.float32))
    g = torch.from_numpy(rng.standard_normal(33).astype(np.float32))
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(op.layer_norm(x, g, None, 1e-5), op.rms_norm(centred, g, 1e-5), atol=2e-6, rtol=0)
