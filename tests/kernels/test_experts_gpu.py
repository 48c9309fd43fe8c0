"""The experts on a GPU: exact witnesses, equal bits in two runs, every property, many and far rows."""

import pytest
import torch

from kernels import compare
from kernels.experts import launch, op, witness
from kernels.experts.module import MixtureOfExperts
from tests.kernels.gpu import EXAMPLES

pytestmark = pytest.mark.gpu


def test_witnesses_are_exact():
    """Equality for every size and dtype: finds layout and assembler bugs that a tolerance would hide."""
    wrong = {name: count for name, count in witness.witnesses("cuda") if count}
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("N", "E", "k", "d", "d_ff"), [(4096, 128, 8, 512, 256), (300, 7, 2, 100, 72)])
def test_two_runs_agree_in_every_bit(N, E, k, d, d_ff, dtype):
    module = MixtureOfExperts(d, d_ff, E, k, device="cuda", dtype=dtype)
    x = torch.randn(N, d, device="cuda", dtype=dtype, requires_grad=True)
    seed = torch.randn(N, d, device="cuda", dtype=dtype)

    def run():
        record = []
        y = module(x, record)
        return y, *torch.autograd.grad(
            [y, record[0].aux_loss], [x, *module.parameters()], [seed, torch.ones((), device="cuda")]
        )

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("name", [prop.name for prop in compare.registry.load("experts").PROPERTIES])
def test_property(name):
    outcomes = compare.compare("experts", examples=EXAMPLES, number=0, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


def test_compiled_without_a_graph_break():
    module = MixtureOfExperts(256, 128, 16, 4, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: module(x).float().square().sum(), fullgraph=True)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled(x).backward()
    assert torch.isfinite(x.grad).all()


def test_many_tokens_and_far_experts():
    """More tokens than a grid's second axis holds, and a matrix that begins beyond 2^31 elements."""
    experts = torch.randint(0, 3, (70_000, 1), device="cuda")
    x, gates = torch.randn(70_000, 64, device="cuda"), torch.ones(70_000, 1, device="cuda")
    w_in, w_down = torch.randn(3, 64, 64, device="cuda"), torch.randn(3, 64, 32, device="cuda")
    y = op.mixture_of_experts(x, gates, w_in, w_down, experts)
    for e in range(3):
        hit = experts[:, 0] == e
        value, gate = (x[hit] @ w_in[e].T).chunk(2, -1)
        wanted = (value * torch.nn.functional.silu(gate)) @ w_down[e].T
        assert torch.allclose(y[hit], wanted, atol=1e-1, rtol=1e-3)
    memory = torch.zeros(2**31 + 2**20, dtype=torch.float16, device="cuda")
    far = memory.as_strided((3, 64, 64), (2**30 + 256, 64, 1))
    far.copy_(w_in)
    half = x.half(), gates, far, w_down.half(), experts
    assert torch.equal(op.mixture_of_experts(*half), op.mixture_of_experts(half[0], gates, far.contiguous(), *half[3:]))
    assert not launch.launching.INTERPRETED
