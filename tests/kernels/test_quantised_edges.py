"""Products with quantised weights at their boundary: errors, odd calls, exact answers, planted bugs, the benchmark."""

import pytest
import torch

from kernels import bench, compare, launching, timing
from kernels.quantised import benchmark, config, launch, op, traffic, witness

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_quantised_gpu.py")


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def codes(*shape):
    return torch.ones(shape, dtype=torch.int8)


def packed(n):
    return torch.zeros(n, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: op.int8_linear(ones(2, 5), codes(3, 4), ones(3, 1)), ValueError, r"x must be of shape \(..., 4\)"),
        (lambda: op.int8_linear(ones(2, 4), codes(12), ones(3, 1)), ValueError, r"codes must be of shape \(n, k\)"),
        (lambda: op.int8_linear(ones(2, 4), codes(3, 4), ones(3)), ValueError, r"scales must be of shape \(3, 1\)"),
        (lambda: op.int8_linear(ones(2, 4), ones(3, 4), ones(3, 1)), TypeError, "codes must be int8"),
        (lambda: op.int8_linear(ones(2, 4), codes(3, 4), ones(3, 1).half()), TypeError, "scales must be float32"),
        (lambda: op.int8_linear(ones(2, 4).double(), codes(3, 4), ones(3, 1)), TypeError, "float32, float16 or bfloat16"),
        (lambda: op.int8_linear(ones(2, 4).bfloat16(), codes(3, 4), ones(3, 1)), TypeError, "bfloat16 needs a GPU"),
        (lambda: op.int8_linear(ones(2, 4), codes(4, 3).t(), ones(3, 1)), ValueError, "codes must be contiguous"),
        (lambda: op.nf4_linear(ones(2, 4), packed(5), ones(1), 3), ValueError, r"codes must be of shape \(6,\)"),
        (lambda: op.nf4_linear(ones(2, 4), packed(6), ones(2), 3), ValueError, r"scales must be of shape \(1,\)"),
        (lambda: op.nf4_linear(ones(2, 4), packed(6).char(), ones(1), 3), TypeError, "codes must be uint8"),
        (lambda: op.nf4_linear(ones(2, 4), packed(6), ones(1), 3, 7), ValueError, "n_out and block must be 0 or more, and even"),
        (
            lambda: op.nf4_double_linear(ones(2, 4), packed(6), codes(1, 256), ones(2, 1), 0.0, 3),
            ValueError, "scales' scales must be of shape",
        ),
        (lambda: op.QuantisedLinear(ones(2, 4), "int4"), ValueError, "kind must be one of 'int8', 'nf4', 'nf4_double'"),
    ],
)  # fmt: skip
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_without_interpreter_or_gpu_the_error_says_how(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"x must be on a GPU, got a tensor on cpu\. Set TRITON_INTERPRET=1"):
        op.int8_linear(ones(2, 4), codes(3, 4), ones(3, 1))


def test_second_derivatives_are_refused_and_not_wrong():
    x = ones(2, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(op.int8_linear(x, codes(3, 4), ones(3, 1)).sum(), x, create_graph=True)


def test_nothing_in_nothing_out():
    assert op.int8_linear(ones(0, 4), codes(3, 4), ones(3, 1)).shape == (0, 3)
    assert op.int8_linear(ones(2, 4), codes(0, 4), ones(0, 1)).shape == (2, 0)
    assert not op.int8_linear(ones(2, 0), codes(3, 0), ones(3, 1)).any()
    x = ones(2, 4).requires_grad_()
    (dx,) = torch.autograd.grad(op.int8_linear(x, codes(0, 4), ones(0, 1)).sum(), x)
    assert not dx.any()


def test_opcheck():
    weight = witness.weight_of("nf4_double", torch.ones(3, 4))
    x = torch.rand(2, 4).requires_grad_()
    torch.library.opcheck(op.quantised_op, (x, *weight))


def test_a_tracer_sees_the_same():
    module = op.QuantisedLinear(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
    x = torch.rand(2, 10).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    (a,), (b,) = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, module))
    assert torch.equal(a, b)


def test_witnesses_are_exact_and_can_fail(monkeypatch):
    assert not {name: count for name, count in witness.witnesses("cpu") if count}
    honest = launch.product

    def shifted(a, weight, backward=False, tile=None):
        return honest(a, weight._replace(codes=weight.codes.roll(1)), backward, tile)

    monkeypatch.setattr(launch, "product", shifted)
    assert all(witness.wrong("cpu", kind, 5, 33, 64, torch.float32) for kind in launch.FORMATS)


def test_bytes_by_hand():
    assert traffic.weight_bytes(64, 64, "int8") == 64 * 64 + 4 * 64
    assert traffic.weight_bytes(64, 64, "nf4") == 2048 + 4 * 64
    assert traffic.weight_bytes(256, 64, "nf4_double") == 8192 + 256 + 4
    assert 8 * traffic.weight_bytes(4096, 4096, "nf4_double") / 4096**2 == pytest.approx(4.127, abs=1e-3)


def test_configuration_is_pure():
    for rows in (1, 16, 17, 10_000):
        for itemsize in (2, 4):
            size = config.tile(rows, itemsize)
            assert size == config.tile(rows, itemsize) and min(size.rows, size.out, size.reduced) >= 16
            assert 64 % size.reduced == 0 and 64 % size.out == 0  # a tile's row lies in one block, in both directions


def test_the_benchmark_runs():
    clock = timing.WallClock()
    for case in benchmark.cases("cpu", True, print, benchmark.SMALLEST_SHAPES, compiled=False):
        assert set(bench.take_turns(case.contenders, clock, 1, 1)) > {"ours"} and case.bytes > 0 and case.flops > 0


# ---- planted bugs: one honest mistake each

RIGHT = """
import numpy as np
import torch
from minillm.functional.nf4 import nf4_levels

def int8_linear(x, codes, scale):
    w = codes.float() * scale
    return x @ w.to(x.dtype).t()

def nf4_linear(x, packed, scale, n_out, block):
    n, k = n_out, x.shape[-1]
    codes = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)[: n * k].long()
    flat = torch.arange(n * k)
    w = torch.from_numpy(nf4_levels().copy())[codes] * scale[flat // block]
    return x @ w.reshape(n, k).to(x.dtype).t()
"""
BUGS = {
    "scale of the next row": ("int8_linear", "codes.float() * scale", "codes.float() * scale.roll(1, 0)"),
    "unsigned codes": ("int8_linear", "codes.float()", "codes.view(torch.uint8).float()"),
    "scale by column": ("int8_linear", "codes.float() * scale", "codes.float() * scale[0]"),
    "halves exchanged": ("nf4_linear", "[packed >> 4, packed & 15]", "[packed & 15, packed >> 4]"),
    "one scale to a row": ("nf4_linear", "flat // block", "flat // k * k // block"),
    "off by one at a block's end": ("nf4_linear", "flat // block", "(flat - 1).clamp(min=0) // block"),
    "blocks begin with rows": ("nf4_linear", "flat // block", "(flat // k * -(-k // block) + flat % k // block).clamp(max=len(scale) - 1)"),
    "even levels": ("nf4_linear", "torch.from_numpy(nf4_levels().copy())", "torch.linspace(-1, 1, 16)"),
    "last column dropped": ("nf4_linear", "return x @", "x = torch.cat([x[..., :-1], 0 * x[..., -1:]], -1)\n    return x @"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_compare_catches(bug, tmp_path):
    name, right, wrong = BUGS[bug]
    assert right in RIGHT
    (tmp_path / "mine.py").write_text(RIGHT.replace(right, wrong))
    subject = compare.reader_subject("quantised", f"{tmp_path}/mine.py:{name}")
    outcomes = compare.compare(
        "quantised", subject, examples=12, number=0, dtypes=["float32"], properties=["reference", "dequantises"]
    )
    assert not all(o.passed for o in outcomes), compare.report(outcomes)


@pytest.mark.parametrize("name", ["int8_linear", "nf4_linear"])
def test_a_right_product_passes(name, tmp_path):
    (tmp_path / "mine.py").write_text(RIGHT)
    subject = compare.reader_subject("quantised", f"{tmp_path}/mine.py:{name}")
    outcomes = compare.compare("quantised", subject, examples=4, number=0, dtypes=["float32"])
    assert outcomes and all(o.passed for o in outcomes), compare.report(outcomes)
