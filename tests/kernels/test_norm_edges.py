"""The norm functions at their boundary: errors, odd calls, gradients that arrive in parts, exact answers, int64."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from kernels import launching
from kernels.norm import config, launch, op, problems, traffic, witness

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_norm_gpu.py")


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).to(dtype)


# ---- errors


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: op.rms_norm(normal(2, 4), normal(5)), ValueError, r"rms_norm: the gain g must be of shape \(4,\)"),
        (
            lambda: op.layer_norm(normal(2, 4), normal(4), normal(4, 1)),
            ValueError,
            r"the shift b must be of shape \(4,\)",
        ),
        (lambda: op.rms_norm(torch.tensor(1.0), normal(1)), ValueError, r"x must be of shape \(..., d\)"),
        (
            lambda: op.add_rms_norm(normal(2, 4), normal(3, 4), normal(4)),
            ValueError,
            r"branch r must be of the stream's",
        ),
        (
            lambda: op.add_rms_norm(normal(2, 4), normal(2, 4, dtype=torch.float16), normal(4)),
            TypeError,
            "stream's dtype",
        ),
        (lambda: op.rms_norm(normal(2, 4).double(), normal(4)), TypeError, "float32, float16 or bfloat16"),
        (
            lambda: op.rms_norm(torch.ones(2, 4, dtype=torch.int64), normal(4)),
            TypeError,
            "float32, float16 or bfloat16",
        ),
        (lambda: op.rms_norm(normal(2, 4, dtype=torch.bfloat16), normal(4)), TypeError, "bfloat16 needs a GPU"),
        (lambda: op.rms_norm(normal(2, 4), normal(4, dtype=torch.bfloat16)), TypeError, "bfloat16 needs a GPU"),
        (lambda: op.rms_norm(normal(2, 4), normal(4), eps=-1.0), ValueError, "eps must be a number of at least 0"),
        (
            lambda: op.rms_norm(normal(2, 4), normal(4), eps=float("nan")),
            ValueError,
            "eps must be a number of at least 0",
        ),
        (lambda: op.rms_norm(normal(2, 4), normal(4).to("meta")), ValueError, "on the device of x, cpu"),
    ],
)
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_without_interpreter_or_gpu_the_error_says_how(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"x must be on a GPU, got a tensor on cpu\. Set TRITON_INTERPRET=1"):
        op.rms_norm(normal(2, 4), normal(4))


def test_second_derivatives_are_refused_and_not_wrong():
    x = normal(2, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(op.rms_norm(x, torch.ones(4)).sum(), x, create_graph=True)


# ---- odd calls


@pytest.mark.parametrize("form", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
def test_sum_and_backward(form):
    """The gradient of a sum has strides of 0."""
    operands = [
        normal(2, 3, 7).requires_grad_() if n in "xr" else normal(7).requires_grad_() for n in problems.OPERANDS[form]
    ]
    result = getattr(op, form)(*operands)
    y = result[-1] if isinstance(result, tuple) else result
    y.sum().backward()
    expanded = [t.grad for t in operands]
    result = getattr(op, form)(*operands)
    y = result[-1] if isinstance(result, tuple) else result
    for a, b in zip(expanded, torch.autograd.grad(y, operands, torch.ones(2, 3, 7))):
        assert torch.equal(a, b)


def test_only_the_sum_is_used():
    x, r, g = normal(2, 5).requires_grad_(), normal(2, 5).requires_grad_(), normal(5).requires_grad_()
    s, _ = op.add_rms_norm(x, r, g)
    dx, dr, dg = torch.autograd.grad(s, (x, r, g), normal(2, 5), allow_unused=True)
    assert torch.equal(dx, normal(2, 5))
    assert torch.equal(dr, normal(2, 5))
    assert dg is None or not dg.any()


def test_frozen_inputs_get_no_gradient():
    x, g = normal(2, 5), normal(5).requires_grad_()
    op.rms_norm(x, g).sum().backward()
    assert x.grad is None
    assert g.grad is not None


def test_weights_of_another_precision():
    """Float32 weights on a float16 stream: y is float16, the gain's gradient float32."""
    x, g, b = (t.requires_grad_() for t in (normal(3, 9, dtype=torch.float16), normal(9), normal(9)))
    y = op.layer_norm(x, g, b)
    y.float().square().sum().backward()
    assert (y.dtype, x.grad.dtype, g.grad.dtype, b.grad.dtype) == (
        torch.float16,
        torch.float16,
        torch.float32,
        torch.float32,
    )
    expected = torch.nn.functional.layer_norm(x.detach().float(), (9,), g.detach(), b.detach())
    torch.testing.assert_close(y.detach().float(), expected, atol=2e-3, rtol=0)


def test_no_shift():
    x, g = normal(3, 9).requires_grad_(), normal(9).requires_grad_()
    y = op.layer_norm(x, g, None)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (9,), g, None), atol=1e-6, rtol=0)
    y.sum().backward()


def test_rows_that_are_no_view_of_a_matrix():
    x = normal(3, 2, 7).transpose(0, 1)
    assert torch.equal(op.rms_norm(x, normal(7)), op.rms_norm(x.contiguous(), normal(7)))


def test_modules_have_torch_names_and_fuse_the_branch():
    ours, theirs = op.LayerNorm(6), torch.nn.LayerNorm(6)
    ours.load_state_dict(theirs.state_dict())
    assert set(op.RMSNorm(6).state_dict()) == set(torch.nn.RMSNorm(6).state_dict())
    x, r = normal(2, 6), normal(2, 6) + 1
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=0)
    s, y = ours(x, r)
    assert torch.equal(s, x + r)
    assert torch.equal(y, ours(s))
    s, y = op.RMSNorm(6)(x, r)
    assert torch.equal(s, x + r)
    assert op.LayerNorm(6, bias=False).bias is None
    assert "6" in repr(ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("centred", "residual"), [(False, False), (True, True)])
def test_custom_op_passes_torchs_own_check(centred, residual):
    x, r = normal(2, 7).requires_grad_(), normal(2, 7).requires_grad_() if residual else None
    g, b = normal(7).requires_grad_(), normal(7).requires_grad_() if centred else None
    torch.library.opcheck(op.norm_op, (x, r, g, b, 1e-5, centred))


@pytest.mark.filterwarnings("ignore")
def test_custom_backward_passes_torchs_own_check():
    rows, row = normal(3, 5), torch.rand(3) + 0.5
    torch.library.opcheck(op.norm_backward_op, (normal(3, 5), normal(3, 5), rows, normal(5), normal(5), row, row, True))


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break_it_equals_eager():
    module = torch.nn.ModuleList([op.LayerNorm(5), op.RMSNorm(5)])

    def function(x, r):
        s, y = module[0](x, r)
        return module[1](2 * y) + s

    x, r = normal(3, 5).requires_grad_(), normal(3, 5).requires_grad_()
    leaves = (x, r, *module.parameters())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, r), function(x, r))
    for a, b in zip(
        torch.autograd.grad(compiled(x, r).sum(), leaves), torch.autograd.grad(function(x, r).sum(), leaves)
    ):
        assert torch.equal(a, b)


# ---- exact answers


def test_witnesses_are_exact():
    wrong = {name: count for name, count in witness.witnesses("cpu") if count}
    assert not wrong


def test_witnesses_can_fail(monkeypatch):
    """One share of the weights' gradients left out, and the equality sees it."""
    honest = launch.backward

    def forgetful(*operands):
        dx, dg, db = honest(*operands)
        return dx, dg - (operands[0][-1] * operands[2][-1].sign()), db

    monkeypatch.setattr(launch, "backward", forgetful)
    assert witness.wrong("cpu", 16, torch.float32, centred=False, residual=False)


# ---- offsets beyond 2^31

FAR = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import numpy as np, torch
from kernels.norm import launch
stride = 2**30 + 8
memory = np.memmap(sys.argv[1], dtype=np.float16, mode="w+", shape=(2 * stride + 64,))  # sparse: nothing is stored
memory[2 * stride : 2 * stride + 5] = [1, 2, 3, 4, 5]
x = torch.from_numpy(memory).as_strided((3, 5), (stride, 1))
g = torch.ones(5, dtype=torch.float16)
near = x.contiguous()
y, _, _, rho = launch.forward(x, None, g, None, 1e-5, False)
assert torch.equal(y, launch.forward(near, None, g, None, 1e-5, False)[0])
for a, b in zip(launch.backward(x, None, x, g, None, rho, None), launch.backward(near, None, near, g, None, rho, None)):
    assert (a is None and b is None) or torch.equal(a, b)
columns = x.T[:, :3].T if False else torch.from_numpy(memory).as_strided((1, 3), (8, stride))
g = torch.ones(3, dtype=torch.float16)
assert torch.equal(launch.forward(columns, None, g, None, 1e-5, False)[0],
                   launch.forward(columns.contiguous(), None, g, None, 1e-5, False)[0])
print("far and near agree")
"""


def test_offsets_beyond_int32(tmp_path):
    """Rows, then columns, 2^30 elements apart in a sparse file: a 32-bit product would wrap and read elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", FAR, str(tmp_path / "far")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "far and near agree", done.stderr[-2000:]


# ---- configuration and traffic are pure functions


def test_configuration_is_pure_and_covers_every_length():
    for d in (1, 2, 15, 16, 17, 100, 1000, 4096, 5000, 8192, 8193, 16_384, 16_385, 100_000):
        tile = config.forward_tile(d)
        assert tile == config.forward_tile(d)
        assert tile.covers(d) == (d <= config.FORWARD_LIMIT)
        for centred in (False, True):
            for residual in (False, True):
                plan = config.backward_plan(1000, d, 2, 132, centred=centred, residual=residual)
                assert plan == config.backward_plan(1000, d, 2, 132, centred=centred, residual=residual)
                assert plan.tile.covers(d) == (plan.means is None)
                assert 1 <= plan.programs <= 1000
    assert config.backward_plan(1, 64, 4, 132, centred=False, residual=False).programs == 1


@pytest.mark.parametrize(("residual", "tensors"), [(False, 2), (True, 4)])
def test_compulsory_bytes_by_hand(residual, tensors):
    found = traffic.forward_bytes(10, 64, 2, 4, centred=True, residual=residual, shift=True)
    assert found == 10 * 64 * 2 * tensors + 64 * 4 * 2 + 10 * 4 * 2
    found = traffic.backward_bytes(10, 64, 2, 4, centred=False, residual=residual, shift=False)
    assert found == 10 * 64 * 2 * (tensors if residual else 3) + 64 * 4 * 2 + 10 * 4


def test_layouts_of_the_problems_are_what_they_say():
    from kernels.problem import LAYOUTS, conform, place

    array = np.arange(24.0).reshape(2, 3, 4)
    for layout in (*LAYOUTS, "expanded", "constant"):
        values = conform(array, layout)
        placed = place(values, "float32", "cpu", layout)
        assert np.array_equal(placed.tensor.numpy(), values), layout
        assert placed.untouched() == 0
        if layout not in ("contiguous",):
            assert not placed.tensor.is_contiguous(), layout
    placed.tensor.as_strided((1,), (1,), placed.tensor.storage_offset() - 1).fill_(7.0)
    assert placed.untouched() == 1
