"""AdamW at its boundary: errors, nothing done on a bad norm, exact answers, planted bugs, tracing, the benchmark."""

import math

import pytest
import torch

from kernels import bench, compare, launching, timing
from kernels.adamw import benchmark, config, family, launch, op, traffic, witness
from kernels.subject import reader_function

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_adamw_gpu.py")
REST = (1e-3, 0.9, 0.95, 1e-8, 0.1)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def four(*shape):
    return [zeros(*shape) for _ in range(4)]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: op.adamw(zeros(2), zeros(3), zeros(2), zeros(2), *REST, 1), ValueError, r"gradient g must be of theta's"),
        (lambda: op.adamw(zeros(2), zeros(2), zeros(3), zeros(2), *REST, 1), ValueError, "m must be of theta's shape"),
        (lambda: op.adamw(zeros(2), zeros(2), zeros(2).half(), zeros(2), *REST, 1), TypeError, "m must be float32"),
        (lambda: op.adamw(zeros(2).double(), *four(2)[1:], *REST, 1), TypeError, "float32, float16 or bfloat16"),
        (lambda: op.adamw(zeros(2, dtype=torch.bfloat16), *four(2)[1:], *REST, 1), TypeError, "bfloat16 needs a GPU"),
        (lambda: op.adamw(zeros(4)[::2], *four(2)[1:], *REST, 1), ValueError, "without gaps"),
        (lambda: op.adamw(*four(2), *REST, 0), ValueError, "t must be a positive integer"),
        (lambda: op.adamw(*four(2), -1.0, *REST[1:], 1), ValueError, "lr must be a non-negative number"),
        (lambda: op.adamw(*four(2), 1e-3, 1.0, 0.95, 1e-8, 0.1, 1), ValueError, r"betas must be two numbers in \[0, 1\)"),
        (lambda: op.adamw(*four(2), 1e-3, 0.9, 0.95, 0.0, 0.1, 1), ValueError, "eps must be a positive number"),
        (lambda: op.adamw(*four(2), *REST, 1, math.inf), ValueError, "scale must be finite"),
        (lambda: op.AdamW([]), ValueError, "the parameters must be at least one tensor"),
        (lambda: op.AdamW([zeros(4)[::2]]), ValueError, "parameter 0 must be without gaps"),
        (lambda: op.AdamW([zeros(2)]).step(0.0), ValueError, "max_norm must be a positive number"),
        (lambda: op.AdamW([zeros(2)]).load_state_dict({"t": 1}), ValueError, "entries must be 3 named"),
        (
            lambda: op.AdamW([zeros(2)]).load_state_dict({"t": 1, "m.0": zeros(3), "n.0": zeros(2)}),
            ValueError, r"m.0 must be of shape \(2,\)",
        ),
    ],
)  # fmt: skip
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_without_interpreter_or_gpu_the_error_says_how(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"theta must be on a GPU, got a tensor on cpu\. Set TRITON_INTERPRET=1"):
        op.adamw(*four(2), *REST, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_norm_that_is_not_finite_changes_nothing(bad):
    p, q = torch.ones(3, 5).requires_grad_(), torch.ones(7).requires_grad_()
    optimizer = op.AdamW([p, q])
    p.grad, q.grad = torch.ones(3, 5), torch.full((7,), bad)
    with pytest.raises(FloatingPointError, match="norm must be finite"):
        optimizer.step(1.0)
    assert torch.equal(p, torch.ones(3, 5)) and torch.equal(q, torch.ones(7))
    assert not any(t.any() for t in optimizer.state_dict().values())


def test_a_graph_from_before_the_step_is_noticed():
    p = torch.ones(3).requires_grad_()
    loss = (p * p).sum()
    optimizer = op.AdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_both_precisions_in_one_model():
    """One norm over all; each precision has its launch."""
    p, q = torch.ones(2, 3, dtype=torch.float16).requires_grad_(), torch.ones(5).requires_grad_()
    optimizer = op.AdamW([p, q], 0.5, weight_decay=0.0)
    p.grad, q.grad = torch.full((2, 3), 2.0, dtype=torch.float16), torch.ones(5)
    assert optimizer.step(1e9) == pytest.approx(math.sqrt(29))
    assert torch.allclose(p.float(), torch.tensor(0.5)) and torch.allclose(q, torch.tensor(0.5))
    assert set(optimizer.state_dict()) == {"t", "m.0", "n.0", "m.1", "n.1", "master.0"}
    other = op.AdamW([p, q])
    other.load_state_dict(optimizer.state_dict())
    assert other.t == 1 and torch.equal(other.weights()[0], optimizer.weights()[0])


def test_gradients_may_lie_anywhere():
    p = torch.arange(12.0).reshape(3, 4).t().requires_grad_()  # dense, not contiguous
    straight = p.detach().clone().contiguous().requires_grad_()
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    a, b = op.AdamW([p], 0.1), op.AdamW([straight], 0.1)
    p.grad, straight.grad = g.t().contiguous().t(), g
    a.step(), b.step()
    assert torch.equal(p, straight) and p.stride() == (1, 4)
    p.grad = torch.ones(1).expand(4, 3)
    a.step()


def test_opcheck():
    theta, g, m, n = (torch.rand(3, 5) for _ in range(4))
    torch.library.opcheck(op.adamw_op, (theta, g, m, n, None, 0.1, 0.9, 0.95, 1e-8, 0.1, 1, 1.0))


def test_witnesses_are_exact_and_can_fail(monkeypatch):
    assert not {name: count for name, count in witness.witnesses("cpu") if count}
    honest = launch.step

    def forgetful(batch, scale, settings):
        batch.owner = batch.owner.clone()
        batch.programs -= 1  # the last tile
        honest(batch, scale, settings)

    monkeypatch.setattr(launch, "step", forgetful)
    assert witness.wrong("cpu", 1025, torch.float32, True)


def test_bytes_by_hand():
    assert traffic.step_bytes(10, 4, False) == 10 * 28  # theta, g, m, n read, all but g written
    assert traffic.step_bytes(10, 2, False) == 10 * (2 + 2 + 8 + 2 + 8)
    assert traffic.step_bytes(10, 2, True) == 10 * (2 + 12 + 2 + 12)
    assert config.BLOCK * 2 % (16 * 32 * config.WARPS) == 0  # whole 16-byte pieces of the smallest type


def test_the_benchmark_runs():
    seconds = timing.WallClock()
    for case in benchmark.cases("cpu", True, print, benchmark.SMALLEST_SHAPES, compiled=False):
        times = bench.take_turns(case.contenders, seconds, 1, 1)
        assert set(times) > {"ours"} and case.bytes > 0


# ---- planted bugs: a step with one honest mistake each, and the property that must see it

RIGHT = """
import torch
def adamw(theta, g, m, n, lr, beta1, beta2, eps, weight_decay, t, scale):
    w, g = theta.float(), g.float() * scale
    m = beta1 * m + (1 - beta1) * g
    n = beta2 * n + (1 - beta2) * g * g
    update = m / (1 - beta1**t) / ((n / (1 - beta2**t)).sqrt() + eps)
    w = w * (1 - lr * weight_decay) - lr * update
    return w.to(theta.dtype), m, n
"""
BUGS = {
    "no correction of the second moment": ("(n / (1 - beta2**t)).sqrt()", "n.sqrt()", {"reference", "first-step"}),
    "corrected one step late": ("m / (1 - beta1**t)", "m / (1 - beta1**(t + 1))", {"reference", "first-step"}),
    "eps inside the root": (".sqrt() + eps)", " + eps).sqrt()", {"reference"}),
    "decay inside the gradient": ("g.float() * scale", "g.float() * scale + weight_decay * w", {"reference", "mirror"}),
    "decay without the rate": ("(1 - lr * weight_decay)", "(1 - weight_decay)", {"reference"}),
    "decay after the step": ("w * (1 - lr * weight_decay) - lr * update", "(w - lr * update) * (1 - lr * weight_decay)",
                             {"reference"}),
    "clip factor in one moment only": ("(1 - beta2) * g * g", "(1 - beta2) * (g / scale) ** 2",
                                       {"reference", "clip-factor"}),
    "last column forgotten": ("update = ", "g[..., -1:] = 0\n    m[..., -1] = 0\n    update = ", {"reference"}),
    "16-bit moments": ("m = beta1 * m", "m = beta1 * m.to(theta.dtype)", {"reference"}),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_compare_catches(bug, tmp_path):
    right, wrong, properties = BUGS[bug]
    assert right in RIGHT
    file = tmp_path / "mine.py"
    file.write_text(RIGHT.replace(right, wrong))
    subject = compare.reader_subject("adamw", f"{file}:adamw")
    outcomes = compare.compare("adamw", subject, examples=25, number=0, properties=sorted(properties | {"reference"}))
    failed = {o.property for o in outcomes if not o.passed}
    assert "reference" in failed, compare.report(outcomes)


def test_a_right_step_passes(tmp_path):
    (tmp_path / "mine.py").write_text(RIGHT)
    name, _ = reader_function(f"{tmp_path}/mine.py:adamw", family.references())
    subject = compare.reader_subject("adamw", f"{tmp_path}/mine.py:adamw")
    outcomes = compare.compare("adamw", subject, examples=8, number=0)
    assert name == "adamw" and not subject.differentiable
    assert outcomes and all(o.passed for o in outcomes), compare.report(outcomes)
