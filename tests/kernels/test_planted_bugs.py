"""The comparison can fail: implementations with one honest mistake each, and the property that must see it."""

import pytest
import torch

from kernels import compare
from kernels.norm import family
from kernels.subject import UsageError, reader_function

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")

HEAD = """
import torch, triton
import triton.language as tl
from torch.nn import functional as F

def right_rms(x, g, eps):
    xf = x.float()
    return (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps) * g.float()).to(x.dtype)

def right_ln(x, g, b, eps):
    xf = x.float()
    c = xf - xf.mean(-1, keepdim=True)
    return (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + eps) * g.float() + b.float()).to(x.dtype)
"""

BUGS = {
    "eps outside the root": ("""
def rms_norm(x, g, eps):
    xf = x.float()
    return (xf / (xf.pow(2).mean(-1, keepdim=True).sqrt() + eps) * g.float()).to(x.dtype)
""", {"reference", "gradient", "columns-permute"}),
    "eps forgotten": ("""
def rms_norm(x, g, eps):
    return right_rms(x, g, 0.0)
""", {"reference", "zero-rows"}),
    "sum instead of mean": ("""
def rms_norm(x, g, eps):
    xf = x.float()
    return (xf * torch.rsqrt(xf.pow(2).sum(-1, keepdim=True) + eps) * g.float()).to(x.dtype)
""", {"reference", "unit-mean-square"}),
    "mean not subtracted": ("""
def layer_norm(x, g, b, eps):
    return (right_rms(x, g, eps).float() + b.float()).to(x.dtype)
""", {"reference", "shift-invariance"}),
    "variance divided by d - 1": ("""
def layer_norm(x, g, b, eps):
    xf = x.float()
    n = x.shape[-1]
    c = xf - xf.mean(-1, keepdim=True)
    return (c * torch.rsqrt(c.pow(2).sum(-1, keepdim=True) / max(n - 1, 1) + eps) * g.float() + b.float()).to(x.dtype)
""", {"reference", "unit-mean-square"}),
    "square in float16": ("""
def rms_norm(x, g, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * g
""", {"reference", "large-values"}),
    "writes into its input": ("""
def rms_norm(x, g, eps):
    y = right_rms(x, g, eps)
    with torch.no_grad():
        x.zero_()
    return y
""", {"inputs-unchanged"}),
    "wrong dtype": ("""
def rms_norm(x, g, eps):
    return right_rms(x.float(), g, eps).float()
""", {"contract"}),
    "normalises x instead of the sum": ("""
def add_rms_norm(x, r, g, eps):
    return x + r, right_rms(x, g, eps)
""", {"reference"}),
    "what arrives at the sum is lost": ("""
def add_rms_norm(x, r, g, eps):
    s = x + r
    return s.detach() + 0 * s, right_rms(s, g, eps)
""", {"gradient"}),
    "gain's gradient of the last row lost": ("""
class Lossy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g, eps):
        ctx.save_for_backward(x, g)
        ctx.eps = eps
        return right_rms(x, g, eps)

    @staticmethod
    def backward(ctx, dy):
        x, g = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            dx, = torch.autograd.grad(right_rms(x, g, ctx.eps), x, dy)
            kept = x.reshape(-1, x.shape[-1])[:-1], dy.reshape(-1, x.shape[-1])[:-1]
            dg, = torch.autograd.grad(right_rms(kept[0], g, ctx.eps), g, kept[1])
        return dx, dg, None

def rms_norm(x, g, eps):
    return Lossy.apply(x, g, eps)
""", {"gradient"}),
    "projection missing in dx": ("""
def rms_norm(x, g, eps):
    xf = x.float()
    return (xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps).detach() * g.float()).to(x.dtype)
""", {"gradient", "gradient-orthogonal"}),
    "mean's term missing in dx": ("""
def layer_norm(x, g, b, eps):
    xf = x.float()
    c = xf - xf.mean(-1, keepdim=True).detach()
    return (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + eps) * g.float() + b.float()).to(x.dtype)
""", {"gradient", "gradient-orthogonal"}),
    "mask of the last block forgotten": ("""
@triton.jit
def kernel(X, G, Y, d, stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d, BLOCK):
        x = tl.load(X + row * stride + start + tl.arange(0, BLOCK)).to(tl.float32)
        squares += x * x
    rho = tl.rsqrt(tl.sum(squares, axis=0) / d + eps)
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride + cols, mask=cols < d, other=0.0).to(tl.float32)
        g = tl.load(G + cols, mask=cols < d, other=0.0).to(tl.float32)
        tl.store(Y + row * d + cols, (x * rho * g).to(Y.dtype.element_ty), mask=cols < d)

def rms_norm(x, g, eps):
    rows, g = x.detach().reshape(-1, x.shape[-1]), g.detach().contiguous()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(rows.shape, dtype=x.dtype)
    if rows.numel():
        kernel[(len(rows),)](rows, g, y, rows.shape[1], rows.stride(0), eps, BLOCK=16)
    return y.reshape(x.shape)
""", {"reference"}),
    "needs contiguous rows and does not say so": ("""
def rms_norm(x, g, eps):
    flat = torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset())
    return right_rms(flat, g, eps)
""", {"reference", "layouts"}),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught_and_shown_small(bug, tmp_path):
    source, expected = BUGS[bug]
    path = tmp_path / "reader.py"
    path.write_text(HEAD + source)
    name = source.split("\ndef ")[-1].split("(")[0]
    subject = compare.reader_subject("norm", f"{path}:{name}")
    outcomes = compare.compare("norm", subject, examples=15, number=0, properties=sorted(expected))
    failed = {outcome.property for outcome in outcomes if not outcome.passed}
    assert failed == expected, compare.report(outcomes)
    smallest = next(outcome for outcome in outcomes if not outcome.passed)
    assert smallest.problem is not None
    assert smallest.problem.inputs["x"].size <= 64, smallest.problem  # shrinking found a case to look at
    assert smallest.problem.function in compare.report(outcomes)


def test_a_right_implementation_passes_everything(tmp_path):
    path = tmp_path / "reader.py"
    path.write_text(HEAD)
    for name, reference in (("right_rms", "rms_norm"), ("right_ln", "layer_norm")):
        subject = compare.reader_subject("norm", f"{path}:{name}")  # known by its parameters
        assert set(subject.functions) == {reference}
        outcomes = compare.compare("norm", subject, examples=8, number=1)
        assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)
        assert "gradient" in {outcome.property for outcome in outcomes}


def test_without_a_gradient_only_the_values_are_checked(tmp_path):
    path = tmp_path / "reader.py"
    path.write_text(HEAD + "\n\n@torch.no_grad()\ndef rms_norm(x, g, eps):\n    return right_rms(x, g, eps)\n")
    subject = compare.reader_subject("norm", f"{path}:rms_norm")
    assert not subject.differentiable
    outcomes = compare.compare("norm", subject, examples=4, number=1)
    names = {outcome.property for outcome in outcomes}
    assert "reference" in names
    assert "gradient" not in names
    assert all(outcome.passed for outcome in outcomes), compare.report(outcomes)


def test_an_implementation_that_raises_fails_with_its_error(tmp_path):
    path = tmp_path / "reader.py"
    path.write_text("def rms_norm(x, g, eps):\n    return x.no_such_method()\n")
    subject = compare.reader_subject("norm", f"{path}:rms_norm")
    (outcome, *_) = compare.compare("norm", subject, examples=3, number=0, properties=["reference"])
    assert not outcome.passed
    assert "no_such_method" in outcome.error
    assert outcome.row()["measured"] > 1e300


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("reader.py", "FILE.py:NAME is wanted"),
        ("reader.txt:f", "FILE.py:NAME is wanted"),
        ("absent.py:f", "there is no file"),
        ("reader.py:absent", "has no function 'absent'; it has odd, rms_norm"),
        ("reader.py:odd", "matches none of the references by name or by parameters"),
        ("broken.py:f", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_loaded_says_why(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reader.py").write_text("def rms_norm(x, g, eps):\n    return x\n\ndef odd(q):\n    return q\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UsageError, match=words):
        reader_function(spec, family.references())
