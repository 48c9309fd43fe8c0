"""The norms on a GPU: exact witnesses, equal bits in two runs, every property, the functions inside torch.compile."""

import pytest
import torch

from kernels import compare, launching
from kernels.norm import op, witness
from tests.kernels.gpu import EXAMPLES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", witness.LENGTHS_GPU)
def test_witnesses_are_exact(d, dtype):
    """Equality for every length, dtype and variant: finds layout and assembler bugs that a tolerance would hide."""
    variants = [(centred, residual) for centred in (False, True) for residual in (False, True)]
    assert not [v for v in variants if witness.wrong("cuda", d, dtype, *v)]


@pytest.mark.parametrize("d", [100, 768, 4096, 5000, 16_384, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_runs_agree_in_every_bit(d, dtype):
    x, r = (torch.randn(1025, d, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    g, b = (torch.randn(d, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    seeds = [torch.randn(1025, d, device="cuda").to(dtype) for _ in range(2)]

    def run():
        outputs = op.add_layer_norm(x, r, g, b)
        return [*outputs, *torch.autograd.grad(outputs, (x, r, g, b), seeds)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, c) for a, c in zip(first, run()))


@pytest.mark.parametrize("name", [prop.name for prop in compare.registry.load("norm").PROPERTIES])
def test_property(name):
    outcomes = compare.compare("norm", examples=EXAMPLES, number=0, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


def test_compiled_without_a_graph_break():
    module = op.LayerNorm(768, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: module(x).float().square().sum(), fullgraph=True)
    x = torch.randn(64, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled(x).backward()
    assert torch.isfinite(x.grad).all()


def test_many_rows_and_far_rows():
    """More rows than a grid's second axis could hold, and an offset beyond 2^31 elements."""
    x = torch.randn(70_000, 64, device="cuda")
    g = torch.ones(64, device="cuda")
    assert torch.allclose(op.rms_norm(x, g), torch.nn.functional.rms_norm(x, (64,), g, 1e-6), atol=1e-5)
    memory = torch.zeros(2**31 + 2**20, dtype=torch.float16, device="cuda")
    far = memory.as_strided((3, 512), (2**30 + 256, 1))
    far.copy_(torch.randn(3, 512))
    near = far.contiguous()
    weight = torch.ones(512, dtype=torch.float16, device="cuda")
    assert torch.equal(op.rms_norm(far, weight), op.rms_norm(near, weight))
    assert not launching.INTERPRETED
