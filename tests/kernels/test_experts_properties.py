"""The experts against the NumPy reference, by property."""

import pytest
import torch

from kernels import compare, registry

pytestmark = [
    pytest.mark.equation(
        "gating-softmax",
        "gating-sigmoid",
        "topk-renormalise",
        "switch-top1",
        "moe-dispatch",
        "moe-expert",
        "moe-combine",
        "moe-output",
        "moe-drop",
        "moe-aux-loss",
        "moe-z-loss",
        "moe-bias-balancing",
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_experts_gpu.py"),
]
PROPERTIES = {prop.name: prop for prop in registry.load("experts").PROPERTIES}


def check(names, examples, dtypes=None):
    outcomes = compare.compare("experts", examples=examples, number=0, properties=names, dtypes=dtypes)
    assert outcomes
    print(compare.report(outcomes))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    assert not failed, compare.report(failed)


@pytest.mark.quick
@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    check([name], examples=3, dtypes=None if name in ("reference", "gradient") else ("float32",))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_properties_on_many_examples(dtype):
    """In one call, so that what several properties look at is computed once."""
    check(list(PROPERTIES), 4, dtypes=[dtype])
