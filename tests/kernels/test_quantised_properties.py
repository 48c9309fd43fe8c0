"""Products with quantised weights against `minillm`'s dequantisation, by property."""

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.quantised import op
from minillm.functional import nf4, quantisation

pytestmark = [
    pytest.mark.equation("int8-quant", "nf4-quant", "double-quant"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_quantised_gpu.py"),
]
PROPERTIES = {prop.name: prop for prop in registry.load("quantised").PROPERTIES}


def check(names, examples, dtypes=None):
    outcomes = compare.compare("quantised", examples=examples, number=0, properties=names, dtypes=dtypes)
    assert outcomes
    failed = [outcome for outcome in outcomes if not outcome.passed]
    assert not failed, compare.report(failed)


@pytest.mark.quick
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    check([name], examples=4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_properties_on_many_examples(dtype):
    """In one call, so that what several properties look at is computed once."""
    check(list(PROPERTIES), 10, dtypes=[dtype])


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4_double"])
@pytest.mark.parametrize("shape", [(48, 64), (5, 21)])
def test_the_module_is_the_product_with_what_minillm_dequantises(kind, shape):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    module = op.QuantisedLinear(torch.from_numpy(w), kind)
    if kind == "int8":
        exact = quantisation.dequantise(quantisation.quantise_int8(w, -1))
    else:
        coded = nf4.quantise_nf4(w)
        if kind == "nf4_double":
            coded = coded._replace(scale=nf4.dequantise_scales(nf4.quantise_scales(coded.scale)))
        exact = nf4.dequantise_nf4(coded)
    x = torch.from_numpy(rng.standard_normal((3, shape[1])).astype(np.float32)).requires_grad_()
    y = module(x)
    np.testing.assert_allclose(y.detach().numpy(), x.detach().numpy() @ exact.T, rtol=0, atol=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    np.testing.assert_allclose(dx.numpy(), np.broadcast_to(exact.sum(0), dx.shape), rtol=0, atol=1e-4)
    again = op.QuantisedLinear(torch.zeros(shape), kind)
    again.load_state_dict(module.state_dict())
    again.mean = module.mean
    assert torch.equal(again(x), y)
