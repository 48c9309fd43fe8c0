"""linear_attention on a GPU: exact witnesses, equal bits in two runs, every property, far offsets."""

import pytest
import torch

from kernels import compare
from kernels.linear_attention import op, witness
from tests.kernels.gpu import EXAMPLES

pytestmark = pytest.mark.gpu


def test_witnesses_are_exact():
    """Equality for every shape, dtype and form: finds layout and assembler bugs that a tolerance would hide."""
    wrong = {name: count for name, count in witness.witnesses("cuda") if count}
    assert not wrong


@pytest.mark.parametrize("name", [prop.name for prop in compare.registry.load("linear_attention").PROPERTIES])
def test_property(name):
    outcomes = compare.compare("linear_attention", examples=EXAMPLES, number=0, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 3000, 64), (1, 2, 1000, 128), (1, 70_000, 17, 16)])
def test_two_runs_agree_in_every_bit(shape, dtype):
    """The last shape has more heads than a grid's second axis could hold."""
    q, k, v = (torch.randn(*shape, device="cuda").to(dtype).requires_grad_() for _ in range(3))
    seed = torch.randn(*shape, device="cuda").to(dtype)

    def run():
        o, state, z = op.elu1_linear_attention(q, k, v)
        return [o, state, z, *torch.autograd.grad(o, (q, k, v), seed)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_a_long_float16_sequence_does_not_overflow():
    """The state passes 65504 long before the end; outputs are averages and stay small."""
    q, k = (torch.ones(1, 1, 100_000, 16, device="cuda", dtype=torch.float16) for _ in range(2))
    v = torch.full((1, 1, 100_000, 16), 2.0, device="cuda", dtype=torch.float16)
    o, state, _ = op.linear_attention(q, k, v)
    assert state.max() > 1e5
    torch.testing.assert_close(o, v, atol=4e-3, rtol=0)
