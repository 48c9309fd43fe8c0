"""AdamW on a GPU: exact witnesses, every property, equal bits in two runs, and beside torch's fused step."""

import pytest
import torch

from kernels import compare
from kernels.adamw import op, witness
from tests.kernels.gpu import EXAMPLES

pytestmark = pytest.mark.gpu


def test_witnesses_are_exact():
    assert not {name: count for name, count in witness.witnesses("cuda") if count}


@pytest.mark.parametrize("name", [prop.name for prop in compare.registry.load("adamw").PROPERTIES])
def test_property(name):
    outcomes = compare.compare("adamw", examples=EXAMPLES, number=0, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


def run(dtype, steps=5):
    torch.manual_seed(0)
    parameters = [torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in ((1000, 513), (4096,), (3, 5))]
    optimizer = op.AdamW(parameters, 0.01)
    norms = []
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, device="cuda").to(dtype)
        norms.append(optimizer.step(1.0))
    return [*parameters, *(t.to("cuda") for t in optimizer.state_dict().values()), torch.tensor(norms)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_runs_agree_in_every_bit(dtype):
    assert all(torch.equal(a, b) for a, b in zip(run(dtype), run(dtype)))


def test_beside_the_fused_step_of_torch():
    torch.manual_seed(0)
    ours = [torch.randn(s, device="cuda").requires_grad_() for s in ((1000, 513), (64, 64))]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    a = op.AdamW(ours, 0.01)
    b = torch.optim.AdamW(theirs, 0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, device="cuda")
            q.grad = p.grad.clone()
        norm = a.step(1.0)
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 1.0).item(), rel=1e-5)
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=2e-6)


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    theta = torch.zeros(2**31 + 1029, device="cuda")
    g, m, n = torch.ones_like(theta), torch.zeros_like(theta), torch.zeros_like(theta)
    op.adamw(theta, g, m, n, 0.5, 0.0, 0.0, 1.0, 0.0, 1)
    assert bool((theta == -0.25).all())
