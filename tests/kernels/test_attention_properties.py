"""Attention against the NumPy reference, by property; and the same in all forms: written, derived, fast."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.attention import op, reference
from kernels.evaluate import evaluate
from kernels.problem import to_array
from minillm.fused import attention as derived

pytestmark = [
    pytest.mark.equation(
        "flash-attention", "attention-context", "gqa", "mqa", "mask-causal", "mask-prefix", "mask-padding",
        "mask-block-diagonal", "sparse-attention-window", "logit-softcap", "logsumexp", "attention-linear-in-values",
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_attention_gpu.py"),
]  # fmt: skip
PROPERTIES = {prop.name: prop for prop in registry.load("attention").PROPERTIES}
TWO, ONE = ("attention_with_lse", "packed_attention"), ("attention_with_lse",)
FEW = {  # which functions the fast part tries; `attention` is one of two results of the first
    "reference": TWO, "gradient": TWO, "layouts": ONE, "inputs-unchanged": ONE, "contract": ONE, "deterministic": ONE,
}  # fmt: skip
HALF = ("reference",)  # what float16 is tried on in the fast part; the slow part tries all


def check(names, examples, dtypes=None, functions=None):
    subject = compare.our_subject("attention")
    if functions:
        subject = replace(subject, functions={f: subject.functions[f] for f in functions})
    outcomes = compare.compare("attention", subject, examples=examples, number=0, properties=names, dtypes=dtypes)
    assert outcomes
    print(compare.report(outcomes))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    assert not failed, compare.report(failed)


@pytest.mark.quick
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    check([name], 3, ("float32", "float16") if name in HALF else ("float32",), FEW.get(name))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_properties_on_many_examples(dtype):
    """In one call, so that what several properties look at is computed once."""
    check(list(PROPERTIES), 4, dtypes=[dtype])


@pytest.mark.parametrize("causal", [False, True])
def test_written_derived_and_fast_agree(causal):
    """One function in three forms: value and gradient, in float32, on one draw."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((2, 2, 19, 8), (2, 1, 33, 8), (2, 1, 33, 5))]
    seed = rng.standard_normal((2, 2, 19, 5)).astype(np.float32)
    a = evaluate(reference.attention, arrays, [seed], np.float32, causal=causal)
    b = evaluate(derived.scaled_dot_product_attention, arrays, [seed], np.float32, causal=causal)
    tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
    out = op.attention(*tensors, causal=causal)
    fast = [to_array(t) for t in (out, *torch.autograd.grad(out, tensors, torch.from_numpy(seed)))]
    for x, y, z in zip([*a[0], *a[1]], [*b[0], *b[1]], fast, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
        np.testing.assert_allclose(x, z, rtol=0, atol=2e-5)


def test_torch_agrees():
    """An implementation that has nothing to do with ours: torch's own attention on the CPU, top-left as it is there."""
    q, k, v = (
        torch.randn(2, h, n, 16, generator=torch.Generator().manual_seed(n)) for h, n in ((4, 18), (2, 21), (2, 21))
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(op.attention(q, k, v, causal=True, align="top-left"), wanted, atol=2e-6, rtol=0)
