"""Linear attention at its boundary: errors, the custom op, gradients in parts, exact answers, plans, far offsets."""

import subprocess
import sys

import pytest
import torch

from kernels import launching
from kernels.linear_attention import config, launch, op, traffic, witness

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_linear_attention_gpu.py")


def uniform(*shape, dtype=torch.float32):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape))) + 0.1).to(dtype)


Q, V, S, Z = (1, 2, 5, 3), (1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 3)


def attend(q=Q, k=Q, v=V, state=None, normaliser=None, eps=1e-6):
    made = [t if isinstance(t, torch.Tensor) or t is None else uniform(*t) for t in (q, k, v, state, normaliser)]
    return op.linear_attention(*made, eps)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: attend(q=(2, 5, 3)), ValueError, r"the queries must be of shape \(B, H, L, d_phi\)"),
        (lambda: attend(k=(1, 2, 6, 3)), ValueError, r"the keys must be of the queries' shape \(1, 2, 5, 3\)"),
        (lambda: attend(v=(1, 2, 6, 4)), ValueError, r"v must be of shape \(1, 2, 5, 'd_v'\)"),
        (lambda: attend(state=S), ValueError, "state and normaliser must be given together"),
        (lambda: attend(state=(1, 2, 4, 3), normaliser=Z), ValueError, r"the state must be of shape \(1, 2, 3, 4\)"),
        (lambda: attend(state=S, normaliser=(1, 2, 4)), ValueError, r"the normaliser must be of shape \(1, 2, 3\)"),
        (lambda: attend(state=uniform(*S).half(), normaliser=Z), TypeError, "the state must be float32"),
        (lambda: attend(v=uniform(*V).half()), TypeError, "of the queries' dtype torch.float32"),
        (lambda: attend(q=uniform(*Q).double()), TypeError, "float32, float16 or bfloat16"),
        (lambda: attend(q=uniform(*Q, dtype=torch.bfloat16)), TypeError, "bfloat16 needs a GPU"),
        (lambda: attend(q=(1, 1, 1, 257), k=(1, 1, 1, 257), v=(1, 1, 1, 4)), ValueError, "d_phi at most 256"),
        (lambda: attend(eps=-1.0), ValueError, "eps must be a number of at least 0"),
        (lambda: attend(k=uniform(*Q).to("meta")), ValueError, "on the device of the queries, cpu"),
        (lambda: op.LinearAttention("relu"), ValueError, "features must be 'elu1' or None"),
    ],
)
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_without_interpreter_or_gpu_the_error_says_how(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"the queries must be on a GPU, got a tensor on cpu\. Set TRITON_INTERPRET=1"):
        attend()


def test_second_derivatives_are_refused_and_not_wrong():
    q = uniform(*Q).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(attend(q=q)[0].sum(), q, create_graph=True)


def test_only_some_outputs_are_used():
    """A gradient that reaches the state alone, the normaliser alone, or the outputs alone: together they are all three."""
    leaves = [uniform(*shape).requires_grad_() for shape in (Q, Q, V, S, Z)]
    seeds = [uniform(*V), uniform(*S), uniform(*Z)]
    outputs = op.elu1_linear_attention(*leaves)
    whole = torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)
    parts = [torch.autograd.grad(o, leaves, s, retain_graph=True, allow_unused=True) for o, s in zip(outputs, seeds)]
    for n, total in enumerate(whole):
        summed = sum(part[n] for part in parts if part[n] is not None)
        torch.testing.assert_close(total, summed, atol=1e-5, rtol=1e-5)


def test_the_module_goes_on_from_a_state():
    q, k, v = uniform(1, 2, 7, 3) - 0.6, uniform(1, 2, 7, 3) - 0.5, uniform(1, 2, 7, 4)
    module = op.LinearAttention()
    whole, (state, _) = module(q, k, v)
    first, passed = module(q[:, :, :3], k[:, :, :3], v[:, :, :3])
    second, (last, _) = module(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:], passed)
    torch.testing.assert_close(torch.cat([first, second], 2), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(last, state, atol=1e-6, rtol=0)
    assert "elu1" in repr(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("continued", [False, True])
def test_custom_op_passes_torchs_own_check(continued):
    q, k, v = (uniform(*shape).requires_grad_() for shape in (Q, Q, V))
    given = [uniform(*S).requires_grad_(), uniform(*Z).requires_grad_()] if continued else [None, None]
    torch.library.opcheck(op.linear_attention_op, (q, k, v, *given, 1e-6, True))


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break_it_equals_eager():
    leaves = [uniform(*shape).requires_grad_() for shape in (Q, Q, V)]
    module = op.LinearAttention()

    def function(q, k, v):
        o, (state, z) = module(q, k, v)
        return o.sum() + state.sum() + z.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(function(*leaves), leaves)):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_witnesses_are_exact():
    wrong = {name: count for name, count in witness.witnesses("cpu") if count}
    assert not wrong


def test_witnesses_can_fail(monkeypatch):
    """The state before every segment but the first forgotten, and the equality sees it."""
    honest = launch._segment_states

    def forgetful(*operands):
        states, weights = honest(*operands)
        states[:, :, 1:] = 0
        return states, weights

    monkeypatch.setattr(launch, "_segment_states", forgetful)
    assert witness.wrong("cpu", witness.SHAPES[0], torch.float32, True, witness.SMALL)


def test_plans_are_pure_and_fill_the_machine_and_no_more():
    for heads, L in ((1, 100_000), (64, 8192), (1000, 512), (1, 1)):
        for itemsize in (2, 4):
            plan = config.plan_for(heads, L, 64, 64, itemsize, 132)
            assert plan == config.plan_for(heads, L, 64, 64, itemsize, 132)
            chunks = -(-L // plan.chunk)
            segments = -(-chunks // plan.per_segment)
            assert 1 <= plan.per_segment <= chunks
            assert segments == 1 or heads * segments <= 2 * 132 * 4
    assert config.plan_for(1000, 512, 64, 64, 2, 132).per_segment == 8  # enough heads: one segment


def test_compulsory_bytes_by_hand():
    assert traffic.forward_bytes(2, 3, 10, 4, 6, 2) == 60 * (2 * 4 + 2 * 6) * 2 + 60 * 4 + 6 * (24 + 4) * 4
    assert traffic.backward_bytes(2, 3, 10, 4, 6, 2) == 60 * (4 * 4 + 4 * 6) * 2 + 60 * 4 + 2 * 6 * (24 + 4) * 4
    assert traffic.forward_flops(2, 3, 10, 4, 6, 5) == 2 * 60 * (2 * 4 * 6 + 5 * 10)


FAR = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import numpy as np, torch
from kernels.linear_attention import launch
stride = 2**30 + 8
memory = np.memmap(sys.argv[1], dtype=np.float16, mode="w+", shape=(2 * stride + 64,))  # sparse: nothing is stored
for n in range(3):
    memory[n * stride : n * stride + 4] = [n + 1, 1, n, 2]
for shape, strides in (((1, 1, 3, 4), (0, 0, stride, 1)), ((1, 3, 1, 4), (0, stride, 0, 1)), ((3, 1, 1, 4), (stride, 0, 0, 1)),
                       ((1, 1, 4, 3), (0, 0, 1, stride))):
    far = torch.from_numpy(memory).as_strided(shape, strides)
    near = far.contiguous()
    a, b = (launch.forward(x, x, x, None, None, 1e-6, True) for x in (far, near))
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])), shape
    a, b = (launch.backward(x, None, None, x, x, x, b[0], b[3], None, None, True) for x in (far, near))
    assert all(torch.equal(x, y) for x, y in zip(a, b)), shape
print("far and near agree")
"""


def test_offsets_beyond_int32(tmp_path):
    """Tokens, heads, sequences, then columns 2^30 elements apart in a sparse file: a 32-bit product would wrap."""
    done = subprocess.run(
        [sys.executable, "-c", FAR, str(tmp_path / "far")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "far and near agree", done.stderr[-2000:]
