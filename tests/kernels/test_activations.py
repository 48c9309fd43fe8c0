"""The gated units against the NumPy reference by property, at their boundary, and with bugs planted."""

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.activations import benchmark, config, launch, op, traffic, witness
from kernels.bench import measure
from kernels.timing import Ceilings, WallClock

pytestmark = [
    pytest.mark.equation("swiglu", "geglu", "silu", "gelu", "glu-split"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_small_families_gpu.py"),
]
PROPERTIES = [prop.name for prop in registry.load("activations").PROPERTIES]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    outcomes = compare.compare("activations", examples=2, number=0, properties=[name])
    assert outcomes
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_property_on_many_examples(name):
    outcomes = compare.compare("activations", examples=20, number=1, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


def test_witnesses_are_exact_and_can_fail(monkeypatch):
    assert not {name: count for name, count in witness.witnesses("cpu") if count}
    honest = launch.backward

    def swapped(dy, value, gate, into, silu):
        honest(dy, value, gate, into[::-1], silu)

    monkeypatch.setattr(launch, "backward", swapped)
    assert witness.wrong("cpu", 16, torch.float32, True)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: op.swiglu(normal(2, 5)), ValueError, "swiglu: the last axis must be of even length"),
        (lambda: op.geglu(torch.tensor(1.0)), ValueError, "geglu: the last axis must be of even length"),
        (lambda: op.swiglu(normal(2, 4).double()), TypeError, "float32, float16 or bfloat16"),
        (lambda: op.swiglu(normal(2, 4, dtype=torch.bfloat16)), TypeError, "bfloat16 needs a GPU"),
        (lambda: op.swiglu_pair(normal(2, 4), normal(4)), ValueError, r"the gate must be of the value's shape \(2, 4\)"),
        (lambda: op.geglu_pair(normal(4), normal(4, dtype=torch.float16)), TypeError, "value's dtype"),
        (lambda: op.swiglu_pair(normal(4), normal(4).to("meta")), ValueError, "on the device of the value"),
    ],
)  # fmt: skip
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_second_derivatives_are_refused():
    h = normal(2, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(op.swiglu(h).sum(), h, create_graph=True)


def test_memory_that_was_reused_is_not_read_again():
    """A second backward, or another reader of the projection, is refused by autograd and not wrong."""
    x = normal(2, 4).requires_grad_()
    y = op.swiglu(2 * x, reuse=True).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_operands_that_share_elements_are_left_alone():
    value, gate = normal(1, 6).expand(3, 6), normal(3, 6)
    v, z = value.clone().requires_grad_(), gate.clone().requires_grad_()
    for a, b in ((value, gate), (v, z)):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        torch.autograd.grad(op.swiglu_pair(a, b, reuse=not a.is_contiguous()).sum(), (a, b))
        assert torch.equal(a.detach(), value)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0,)])
def test_nothing_gives_nothing(shape):
    h = torch.zeros(shape, requires_grad=True)
    y = op.swiglu(h)
    y.sum().backward()
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    assert h.grad is not None


@pytest.mark.filterwarnings("ignore")
def test_custom_ops_pass_torchs_own_check_and_compile():
    h, g = normal(3, 8).requires_grad_(), normal(3, 8).requires_grad_()
    torch.library.opcheck(op.gated_op, (h, None, True))
    torch.library.opcheck(op.gated_op, (h, g, False))
    module = op.SwiGLU()
    compiled = torch.compile(lambda h: module(2 * h), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h), module(2 * h))
    assert torch.equal(op.GEGLU()(h), op.geglu_pair(*launch.halves(h)))
    a, b = (torch.autograd.grad(f(h).sum(), h)[0] for f in (compiled, lambda h: module(2 * h)))
    assert torch.equal(a, b)


def test_configuration_and_bytes_by_hand():
    for d in (1, 16, 17, 1000, 100_000):
        for backward in (False, True):
            size = config.tile(d, backward)
            assert size.block_rows * size.block_d == (1_024 if backward else 2_048)
    assert (traffic.forward_bytes(10, 8, 2), traffic.backward_bytes(10, 8, 2)) == (480, 800)


def test_the_benchmark_runs():
    ceilings = Ceilings(lambda: torch.zeros(8).clone(), 64)
    cases = benchmark.cases("cpu", True, print, benchmark.SMALLEST_SHAPES, compiled=False)
    rows = [row for case in cases for row in measure("activations", case, WallClock(), ceilings, "cpu", 1, 1)]
    assert {row["peer"] for row in rows} >= {"torch"}
    assert len(rows) >= 4


# ---- planted bugs

HEAD = "import torch\nfrom torch.nn import functional as F\n\n"
BUGS = {
    "gate and value exchanged": ("def swiglu(h):\n    z, v = h.chunk(2, -1)\n    return v * F.silu(z)\n", "reference"),
    "the approximation of GELU": (
        "def geglu_pair(value, gate):\n    return value * F.gelu(gate, approximate='tanh')\n", "reference"
    ),
    "sigmoid without its gate": (
        "def swiglu_pair(value, gate):\n    return value * torch.sigmoid(gate)\n", "zero-gate"
    ),
    "the slope forgets the sigmoid's own": (
        "def swiglu_pair(value, gate):\n    return value * gate * torch.sigmoid(gate).detach()\n", "gradient"
    ),
    "rounded between": (
        "def swiglu(h):\n    v, z = h.half().chunk(2, -1)\n    return (v * F.silu(z)).to(h.dtype)\n", "reference"
    ),
    "the last column lost": (
        "def geglu(h):\n    v, z = h.chunk(2, -1)\n    y = v * F.gelu(z)\n"
        "    return y * (torch.arange(y.shape[-1]) < max(y.shape[-1] // 16 * 16, 1))\n", "reference"
    ),
    "writes into its input": (
        "def swiglu(h):\n    v, z = h.chunk(2, -1)\n    y = v * F.silu(z)\n    h.detach()[..., :1] += 1\n    return y\n",
        "inputs-unchanged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    source, expected = BUGS[bug]
    path = tmp_path / "reader.py"
    path.write_text(HEAD + source)
    name = source.split("def ")[1].split("(")[0]
    subject = compare.reader_subject("activations", f"{path}:{name}")
    outcomes = compare.compare("activations", subject, examples=15, number=0, properties=[expected])
    assert any(not outcome.passed for outcome in outcomes), compare.report(outcomes)


def test_a_right_implementation_passes(tmp_path):
    path = tmp_path / "reader.py"
    path.write_text(
        HEAD
        + "def swiglu(h):\n    v, z = h.float().chunk(2, -1)\n    return (v * F.silu(z)).to(h.dtype).contiguous()\n"
    )
    outcomes = compare.compare(
        "activations", compare.reader_subject("activations", f"{path}:swiglu"), examples=3, number=0
    )
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)
    assert np.isfinite(outcomes[0].verdict.measured)
