"""Attention on a GPU: exact witnesses, equal bits in two runs, every property, long texts, inside torch.compile."""

import pytest
import torch

from kernels import compare
from kernels.attention import op, witness
from tests.kernels.gpu import EXAMPLES

pytestmark = pytest.mark.gpu


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widths", witness.WIDTHS_GPU)
def test_witnesses_are_exact(widths, dtype):
    """Equality for every width, dtype and mask: finds layout and assembler bugs that a tolerance would hide."""
    found = witness.of_kind("cuda", dtype, *widths, witness.MASKS, witness.LENGTHS)
    assert not {name: count for name, count in found if count}


@pytest.mark.parametrize("d", [40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_runs_agree_in_every_bit(d, dtype):
    q, k, v = normal(2, 4, 1025, d, dtype=dtype), normal(2, 2, 777, d, dtype=dtype), normal(2, 2, 777, d, dtype=dtype)
    seed = torch.randn(2, 4, 1025, d, device="cuda").to(dtype)

    def run():
        out = op.attention(q, k, v, causal=True)
        return [out, *torch.autograd.grad(out, (q, k, v), seed)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@pytest.mark.parametrize("name", [prop.name for prop in compare.registry.load("attention").PROPERTIES])
def test_property(name):
    outcomes = compare.compare("attention", examples=EXAMPLES, number=0, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


@pytest.mark.parametrize("causal", [False, True])
def test_long_texts_agree_with_torch(causal):
    q, k, v = normal(1, 8, 8192, 128), normal(1, 2, 8192, 128), normal(1, 2, 8192, 128)
    seed = torch.randn_like(q)
    results = []
    for function in (
        lambda: op.attention(q, k, v, causal=causal),
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True),
    ):
        out = function()
        results.append([out, *torch.autograd.grad(out, (q, k, v), seed)])
    for a, b in zip(*results):
        assert (a.float() - b.float()).norm() < 1e-2 * b.float().norm()


def test_memory_does_not_grow_with_the_square_of_the_length():
    peaks = []
    for L in (8192, 16_384):
        q, k, v = (normal(1, 4, L, 64) for _ in range(3))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        op.attention(q, k, v, causal=True).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]


def test_more_programs_than_a_second_axis_could_hold():
    q, k, v = normal(70_000, 1, 4, 16), normal(70_000, 1, 4, 16), normal(70_000, 1, 4, 16)
    # Written out: torch's own kernels have limits of their own on the number of heads.
    wanted = (q.float() @ k.float().mT / 4).softmax(-1) @ v.float()
    assert torch.allclose(op.attention(q, k, v).float(), wanted, atol=3e-2)


def test_compiled_without_a_graph_break():
    compiled = torch.compile(lambda q, k, v: op.attention(q, k, v, causal=True).float().square().sum(), fullgraph=True)
    q, k, v = (normal(2, 4, 100, 64) for _ in range(3))
    compiled(q, k, v).backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))
