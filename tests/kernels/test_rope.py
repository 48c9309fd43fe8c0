"""The rotation against the NumPy reference by property, at its boundary, and with bugs planted."""

import numpy as np
import pytest
import torch

from kernels import compare, registry
from kernels.bench import measure
from kernels.rope import benchmark, config, launch, op, traffic, witness
from kernels.timing import Ceilings, WallClock
from minillm.functional.positions import rotation_angles

pytestmark = [
    pytest.mark.equation("pos-rope"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_small_families_gpu.py"),
]
PROPERTIES = [prop.name for prop in registry.load("rope").PROPERTIES]
COS, SIN = op.table(rotation_angles(np.arange(9), 8))


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    outcomes = compare.compare("rope", examples=6, number=0, properties=[name])
    assert outcomes
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_property_on_many_examples(name):
    outcomes = compare.compare("rope", examples=40, number=1, properties=[name])
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


def test_witnesses_are_exact_and_can_fail(monkeypatch):
    assert not {name: count for name, count in witness.witnesses("cpu") if count}
    honest = launch.turn
    monkeypatch.setattr(launch, "turn", lambda x, cos, sin, *rest, **how: honest(x, cos, -sin, *rest, **how))
    assert witness.wrong("cpu", 24, torch.float32, "half")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: op.rope(normal(2, 7), COS, SIN), ValueError, "with an even d_head"),
        (lambda: op.rope(normal(2, 6), COS, SIN), ValueError, r"cos must be \(n, 3\)"),
        (lambda: op.rope(normal(2, 8), COS, SIN[:5]), ValueError, "cos and sin must be of one shape"),
        (lambda: op.rope(normal(2, 8), COS, SIN, pairing="pairs"), ValueError, "pairing must be one of"),
        (lambda: op.rope(normal(4, 8), COS, SIN, start=6), ValueError, r"start must be in 0\.\.5"),
        (lambda: op.rope(normal(4, 8), COS, SIN, torch.zeros(3, dtype=torch.int64)), ValueError, r"positions must be"),
        (lambda: op.rope(normal(4, 8), COS, SIN, torch.zeros(4)), TypeError, "positions must be int64 or int32"),
        (lambda: op.rope(normal(4, 8).double(), COS, SIN), TypeError, "float32, float16 or bfloat16"),
        (lambda: op.rope(normal(4, 8), COS.half(), SIN.half()), TypeError, "cos must be float32"),
        (lambda: op.rope(normal(4, 8, dtype=torch.bfloat16), COS, SIN), TypeError, "bfloat16 needs a GPU"),
        (lambda: op.rope_(normal(1, 8).expand(4, 8), COS, SIN), ValueError, "without repeated elements"),
    ],
)
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_second_derivatives_are_refused():
    x = normal(2, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(op.rope(x, COS, SIN).sum(), x, create_graph=True)


def test_heads_keep_their_layout():
    """Heads that lie within positions, as a joint projection leaves them, stay there: no copy before the next product."""
    x = normal(2, 5, 3, 8)
    found = op.rope(x.transpose(1, 2), COS, SIN)
    assert found.transpose(1, 2).is_contiguous()
    assert torch.equal(found, op.rope(x.transpose(1, 2).contiguous(), COS, SIN))


def test_a_cache_goes_on_where_it_stopped():
    """Tokens turned one at a time are those of the whole text, in queries and keys of different numbers of heads."""
    module = op.RotaryPositions(9, 8, pairing="half")
    q, k = normal(1, 4, 5, 8), normal(1, 2, 5, 8)
    whole = module(q, k)
    for t in range(5):
        for a, b in zip(whole, module(q[:, :, t : t + 1], k[:, :, t : t + 1], start=t)):
            assert torch.equal(a[:, :, t : t + 1], b)
    assert not module.state_dict()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 3, 8), (3, 0)])
def test_nothing_gives_nothing(shape):
    x = torch.zeros(shape, requires_grad=True)
    op.rope(x, COS[:, : shape[-1] // 2], SIN[:, : shape[-1] // 2]).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.filterwarnings("ignore")
def test_custom_op_passes_torchs_own_check_and_compiles():
    x = normal(2, 3, 8).requires_grad_()
    positions = torch.tensor([[4, 0, 1], [2, 2, 8]])
    torch.library.opcheck(op.rope_op, (x, COS, SIN, positions, 0, "half", False))
    compiled = torch.compile(lambda x: op.rope(2 * x, COS, SIN, start=1), fullgraph=True, backend="aot_eager")
    a, b = compiled(x), op.rope(2 * x, COS, SIN, start=1)
    assert torch.equal(a, b)
    assert torch.equal(torch.autograd.grad(a.square().sum(), x)[0], torch.autograd.grad(b.square().sum(), x)[0])


def test_configuration_and_bytes_by_hand():
    for d in (2, 24, 64, 80, 128, 256, 512):
        for pairing in ("half", "interleaved"):
            assert 2 * config.tile(d, pairing).block_half >= d
    assert traffic.turn_bytes(2, 3, 5, 8, 2) == 2 * 240 * 2 + 5 * 8 * 4


def test_the_benchmark_runs():
    ceilings = Ceilings(lambda: torch.zeros(8).clone(), 64)
    cases = benchmark.cases("cpu", True, print, benchmark.SMALLEST_SHAPES, compiled=False)
    rows = [row for case in cases for row in measure("rope", case, WallClock(), ceilings, "cpu", 1, 1)]
    assert len(rows) >= 3


# ---- planted bugs

HEAD = """
import torch

def right(x, cos, sin, positions, start, pairing, sign=1.0, shift=0):
    L = x.shape[-2]
    rows = (torch.arange(L) if positions is None else positions) + start + shift
    c, s = cos[rows], sign * sin[rows]
    if c.ndim == 3:
        c, s = (t.reshape(len(t), *[1] * (x.ndim - 3), L, -1) for t in (c, s))
    xf = x.float()
    a, b = (xf[..., ::2], xf[..., 1::2]) if pairing == "interleaved" else xf.chunk(2, -1)
    p, q = a * c - b * s, b * c + a * s
    y = torch.stack([p, q], -1).reshape(x.shape) if pairing == "interleaved" else torch.cat([p, q], -1)
    return y.to(x.dtype)

def rope(x, cos, sin, positions, start, pairing):
"""
BUGS = {
    "turns the other way": ("    return right(x, cos, sin, positions, start, pairing, -1.0)\n", "reference"),
    "one pairing only": ("    return right(x, cos, sin, positions, start, 'half')\n", "reference"),
    "start forgotten": ("    return right(x, cos, sin, positions, 0, pairing)\n", "offset"),
    "counts from 1": (
        "    return right(x, cos, sin, positions, max(start - 1, 0), pairing, shift=1)\n", "first-position"
    ),
    "positions of the first text for all": (
        "    p = positions[:1].expand_as(positions) if positions is not None and positions.ndim == 2 else positions\n"
        "    return right(x, cos, sin, p, start, pairing)\n", "reference"
    ),
    "table in the dtype of x": ("    return right(x, cos.half(), sin.half(), positions, start, pairing)\n", "reference"),
    "backward turns on": (
        "    y = right(x, cos, sin, positions, start, pairing)\n"
        "    back = right(x, cos, sin, positions, start, pairing, -1.0)\n"
        "    return back + (y - back).detach()\n", "gradient"
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    source, expected = BUGS[bug]
    path = tmp_path / "reader.py"
    path.write_text(HEAD + source)
    subject = compare.reader_subject("rope", f"{path}:rope")
    outcomes = compare.compare("rope", subject, examples=30, number=0, properties=[expected])
    assert any(not outcome.passed for outcome in outcomes), compare.report(outcomes)


def test_a_right_implementation_passes(tmp_path):
    path = tmp_path / "reader.py"
    path.write_text(HEAD + "    return right(x, cos, sin, positions, start, pairing)\n")
    outcomes = compare.compare("rope", compare.reader_subject("rope", f"{path}:rope"), examples=8, number=0)
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)
