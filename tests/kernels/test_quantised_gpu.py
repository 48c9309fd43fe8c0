"""Products with quantised weights on a GPU: exact witnesses, every property, equal bits in two runs."""

import pytest
import torch

from kernels import compare
from kernels.quantised import op, witness
from tests.kernels.gpu import EXAMPLES

pytestmark = pytest.mark.gpu


def test_witnesses_are_exact():
    """Equality for every format, type and both directions: finds layout and assembler bugs."""
    assert not {name: count for name, count in witness.witnesses("cuda") if count}


@pytest.mark.parametrize("name", [prop.name for prop in compare.registry.load("quantised").PROPERTIES])
def test_property(name):
    outcomes = compare.compare("quantised", examples=EXAMPLES, number=0, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4_double"])
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_large_products_and_two_runs(kind, rows):
    torch.manual_seed(0)
    module = op.QuantisedLinear(torch.randn(4096, 1024, device="cuda"), kind)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = module(torch.eye(1024, device="cuda", dtype=torch.bfloat16)).t()
    y, again = module(x), module(x)
    assert torch.equal(y, again)
    torch.testing.assert_close(y, x @ w.t(), rtol=2e-2, atol=0.5)
    dy = torch.randn_like(y)
    (dx,), (twice,) = (torch.autograd.grad(out, x, dy) for out in (y, again))
    assert torch.equal(dx, twice)
    torch.testing.assert_close(dx, dy @ w, rtol=2e-2, atol=1.0)
