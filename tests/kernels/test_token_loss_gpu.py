"""The losses on a GPU: exact witnesses, equal bits in two runs, every property, the functions inside torch.compile."""

import pytest
import torch

from kernels import compare
from kernels.token_loss import op, witness
from tests.kernels.gpu import EXAMPLES

pytestmark = pytest.mark.gpu


def test_witnesses_are_exact():
    """Equality for every vocabulary and dtype: finds layout and assembler bugs that a tolerance would hide."""
    assert not {name: count for name, count in witness.witnesses("cuda") if count}


@pytest.mark.parametrize("V", [2, 1000, 16_384, 50_257, 128_256, 262_144])
@pytest.mark.parametrize("inplace", [False, True])
def test_two_runs_agree_in_every_bit(V, inplace):
    logits = torch.randn(64, V, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, V, (64,), device="cuda")

    def run():
        work = logits * 1
        loss = op.cross_entropy(work, targets, label_smoothing=0.1, inplace=inplace)
        return loss.detach(), torch.autograd.grad(loss, work)[0].clone()

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_the_fused_loss_runs_the_same_twice_and_without_logits_in_memory():
    hidden = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(128_256, 1024, device="cuda") / 32).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 128_256, (4096,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def run():
        return torch.autograd.grad(op.linear_cross_entropy(hidden, weight, targets), (hidden, weight))

    first = run()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = (hidden.numel() + weight.numel()) * 2
    assert peak < gradients + (256 << 20)
    assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("name", [prop.name for prop in compare.registry.load("token_loss").PROPERTIES])
def test_property(name):
    outcomes = compare.compare("token_loss", examples=EXAMPLES, number=0, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


def test_compiled_without_a_graph_break():
    targets = torch.randint(0, 1000, (64,), device="cuda")
    compiled = torch.compile(lambda z: op.cross_entropy(2 * z, targets, z_loss=1e-4), fullgraph=True)
    z = torch.randn(64, 1000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled(z).backward()
    assert torch.isfinite(z.grad).all()


def test_more_rows_than_a_second_grid_axis_holds():
    z = torch.randn(70_000, 32, device="cuda")
    targets = torch.randint(0, 32, (70_000,), device="cuda")
    expected = torch.nn.functional.cross_entropy(z, targets)
    torch.testing.assert_close(op.cross_entropy(z, targets), expected, atol=1e-5, rtol=0)
    head = torch.randn(64, 32, device="cuda")
    expected = torch.nn.functional.cross_entropy(z @ head.T, targets)
    torch.testing.assert_close(op.linear_cross_entropy(z, head, targets), expected, atol=1e-3, rtol=0)
