"""Attention at its boundary: errors, odd calls, the custom op, exact answers, offsets of 64 bits, the assembler's guard."""

import subprocess
import sys

import pytest
import torch

from kernels.attention import assembler, benchmark, config, launch, op, traffic, witness
from kernels.bench import measure as measure_case
from kernels.timing import WallClock, measured_ceilings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_attention_gpu.py")


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).to(dtype)


def operands(L=5, H=2, H_kv=1, d=8, d_v=8, dtype=torch.float32):
    return [normal(1, h, L, w, dtype=dtype).requires_grad_() for h, w in ((H, d), (H_kv, d), (H_kv, d_v))]


# ---- errors


def attend(*, q=None, k=None, v=None, **how):
    given = [x if x is not None else t for x, t in zip((q, k, v), operands())]
    return op.attention(*given, **how)


STARTS = torch.tensor([0, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: attend(q=normal(2, 5, 8)), ValueError, r"attention: q must be of shape \(B, H, L_q, d_head\)"),
        (lambda: attend(k=normal(2, 1, 5, 8)), ValueError, r"k must be of shape \(B=1, H_kv, L_k, d_head\)"),
        (lambda: attend(k=normal(1, 1, 5, 9)), ValueError, "the width of k must be that of q, 8"),
        (lambda: attend(v=normal(1, 1, 4, 8)), ValueError, r"v must be of shape \(1, 1, 5, 'd_v'\)"),
        (lambda: attend(q=normal(1, 3, 5, 8), k=normal(1, 2, 5, 8), v=normal(1, 2, 5, 8)), ValueError, "a positive divisor of H = 3"),
        (lambda: attend(*(), q=normal(1, 1, 5, 257), k=normal(1, 1, 5, 257)), ValueError, r"d_head must be in 1\.\.256"),
        (lambda: attend(q=normal(1, 2, 5, 8).double()), TypeError, "float32, float16 or bfloat16"),
        (lambda: attend(q=normal(1, 2, 5, 8, dtype=torch.bfloat16)), TypeError, "bfloat16 needs a GPU"),
        (lambda: attend(q=normal(1, 2, 5, 8, dtype=torch.float16)), TypeError, "k must be of the dtype of q"),
        (lambda: attend(window=3), ValueError, "window must be left out without causal=True"),
        (lambda: attend(causal=True, window=0), ValueError, "window must be a positive integer"),
        (lambda: attend(prefix=3), ValueError, "prefix must be left out without causal=True"),
        (lambda: attend(causal=True, prefix=torch.tensor([1.0])), TypeError, "prefix must be int64 or int32"),
        (lambda: attend(key_lengths=torch.tensor([1, 2])), ValueError, r"key_lengths must be of shape \(B,\) = \(1,\)"),
        (lambda: attend(causal=True, align="left"), ValueError, "align must be one of 'bottom-right', 'top-left'"),
        (lambda: attend(scale=-1.0), ValueError, "scale must be a positive number"),
        (lambda: attend(scale=float("nan")), ValueError, "scale must be a positive number"),
        (lambda: attend(softcap=0.0), ValueError, "softcap must be a positive number, or None"),
        (lambda: op.packed_attention(*operands(), STARTS, STARTS), ValueError, r"q must be of shape \(T_q, H, d_head\)"),
        (lambda: op.packed_attention(normal(2, 2, 8), normal(2, 1, 8), normal(2, 1, 8), STARTS, STARTS[:1]), ValueError, "starts_k"),
        (lambda: op.packed_attention(normal(2, 2, 8), normal(2, 1, 8), normal(2, 1, 8), STARTS.float(), STARTS), TypeError, "starts_q"),
    ],
)  # fmt: skip
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_second_derivatives_are_refused_and_not_wrong():
    q, k, v = operands()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(op.attention(q, k, v).sum(), q, create_graph=True)


# ---- odd calls


def test_only_the_log_sum_exps_are_used():
    q, k, v = operands()
    _, lse = op.attention_with_lse(q, k, v)
    assert lse.dtype == torch.float32
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * 8**-0.5
    wanted = torch.autograd.grad(torch.logsumexp(scores, -1).sum(), (q, k))
    torch.testing.assert_close((dq, dk), wanted, atol=1e-5, rtol=0)
    assert not dv.any()


def test_a_prefix_may_be_one_number():
    q, k, v = operands(20)
    ours = op.attention(q, k, v, prefix=7, causal=True)
    assert torch.equal(ours, op.attention(q, k, v, prefix=torch.tensor([7]), causal=True))
    assert not torch.equal(ours, op.attention(q, k, v, causal=True))


def test_results_are_laid_out_like_projections():
    """Heads that lie side by side stay so, and the gradients of q, k and v as well: no copies around the kernel."""
    q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in operands(5, 2, 2))
    out = op.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    assert all(g.transpose(1, 2).is_contiguous() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    assert op.attention(*(t.contiguous() for t in (q, k, v))).is_contiguous()


def test_a_row_without_keys_among_others():
    """Causal, bottom-right, more queries than keys: the first queries see nothing, the others are as without them."""
    q, k, v = normal(1, 2, 20, 8).requires_grad_(), normal(1, 2, 3, 8), normal(1, 2, 3, 8)
    out, lse = op.attention_with_lse(q, k, v, causal=True)
    assert not out[:, :, :17].any()
    assert (lse[:, :, :17] == float("-inf")).all()
    torch.testing.assert_close(out[:, :, 17:], op.attention(q[:, :, 17:], k, v, causal=True), atol=1e-6, rtol=0)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert torch.isfinite(dq).all()
    assert not dq[:, :, :17].any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_custom_op_passes_torchs_own_check():
    q, k, v = operands(3)
    how = (True, 2, True, 0.5, 3.0)
    torch.library.opcheck(op.attention_op, (q, k, v, torch.tensor([2]), None, None, None, *how))
    q, k, v = (t.detach() for t in (q, k, v))
    o, lse = launch.forward(q, k, v, launch.Pattern(), 0.5, None)
    none = (None, None, None, None, False, 0, True, 0.5, 0.0)
    torch.library.opcheck(op.attention_backward_op, (o, lse, q, k, v, o, lse, *none))


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break_it_equals_eager():
    def function(q, k, v, starts):
        packed = op.packed_attention(q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), starts, starts)
        return op.attention(q, k, v, causal=True).square().sum() + packed.sum()

    leaves = operands(5)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves, starts), function(*leaves, starts))
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves, starts), leaves), torch.autograd.grad(function(*leaves, starts), leaves)
    ):
        assert torch.equal(a, b)


# ---- exact answers


def test_witnesses_are_exact():
    wrong = {name: count for name, count in witness.witnesses("cpu") if count}
    assert not wrong


def test_witnesses_can_fail(monkeypatch):
    """The second half of every tile of keys twice as heavy, and the equality sees it."""
    honest = launch.forward

    def heavy(q, k, v, *rest):
        return honest(q, k, v + (torch.arange(v.shape[2]) % 16 == 9)[:, None], *rest)

    monkeypatch.setattr(launch, "forward", heavy)
    assert witness.wrong("cpu", "full", 24, 16, torch.float32, (20, 37), 2, witness.SMALL)


# ---- offsets beyond 2^31

FAR = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import numpy as np, torch
from kernels.attention import launch
stride = 2**30 + 8
memory = np.memmap(sys.argv[1], dtype=np.float16, mode="w+", shape=(2 * stride + 64,))  # sparse: nothing is stored
rng = np.random.default_rng(0)
for row in range(3):
    memory[row * stride : row * stride + 8] = rng.standard_normal(8)
far = torch.from_numpy(memory).as_strided((1, 1, 3, 8), (0, 0, stride, 1))
heads = torch.from_numpy(memory).as_strided((1, 3, 1, 8), (0, stride, 0, 1))
for t in (far, heads):
    near, pattern = t.contiguous(), launch.Pattern(True)
    o, lse = launch.forward(t, t, t, pattern, 0.5, None)
    wanted = launch.forward(near, near, near, pattern, 0.5, None)
    assert torch.equal(o, wanted[0]) and torch.equal(lse, wanted[1])
    a = launch.backward(t, None, t, t, t, o, lse, pattern, 0.5, None)
    b = launch.backward(near, None, near, near, near, o, lse, pattern, 0.5, None)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
print("far and near agree")
"""


def test_offsets_beyond_int32(tmp_path):
    """Rows, then heads, 2^30 elements apart in a sparse file: a 32-bit product would wrap and read elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", FAR, str(tmp_path / "far")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "far and near agree", done.stderr[-2000:]


# ---- the assembler's guard


@pytest.mark.parametrize(
    ("capability", "version", "wanted"),
    [
        ((9, 0), "12.8.93", False), ((9, 0), "13.3.0", True), ((9, 0), "13.4.59", True), ((9, 0), "13.2.99", False),
        ((9, 0), "unknown", False), ((8, 0), "12.8.93", True), ((10, 0), "12.9.86", True), ((9, 0), "14.0", True),
    ],
)  # fmt: skip
def test_old_assemblers_are_not_trusted_on_hopper(capability, version, wanted):
    assert assembler.trusted(capability, version) == wanted


def test_a_wrong_witness_refuses_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(assembler, "_witnessed", lambda *kind: ("12.8.93", {"causal 128/128": 7}))
    with pytest.raises(RuntimeError, match=r"attention: the kernels give wrong results.*TRITON_PTXAS_PATH"):
        assembler.require_safe("attention", torch.device("cuda", 0), torch.bfloat16, 128, 128)
    assembler.require_safe("attention", torch.device("cuda", 0), torch.float32, 128, 128)  # has no such instructions
    monkeypatch.setattr(assembler, "_witnessed", lambda *kind: ("12.8.93", {}))
    assembler.require_safe("attention", torch.device("cuda", 0), torch.bfloat16, 128, 128)


def test_what_a_call_needs_is_witnessed_once_and_nothing_else(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(assembler.aot, "assembler_version", lambda: "12.8.93")
    monkeypatch.setattr(witness, "wrong", lambda device, mask, d, *rest: asked.append((device, mask, d)) or 0)
    assembler._witnessed.cache_clear()
    for d in (4, 96, 96):
        assembler.require_safe("attention", torch.device("cuda", 1), torch.float16, d, 64)
    assembler._witnessed.cache_clear()
    assert asked == [("cuda:1", mask, d) for d in (16, 96) for mask in ("full", "causal")]


# ---- configuration and traffic are pure functions


def test_every_width_has_a_plan_on_every_machine():
    for target in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"):
        for itemsize in (2, 4):
            for widths in ((1, 1), (24, 80), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)):
                plan = config.plan_for(target, itemsize, *widths)
                assert plan == config.plan_for(target, itemsize, *widths)
                assert all(t.block_m >= 16 and t.block_n >= 16 for t in (plan.forward, plan.keys, plan.queries))


@pytest.mark.parametrize("mask", witness.MASKS)
def test_tiles_are_skipped_exactly_where_nobody_sees_anybody(mask):
    _, keep = witness._pattern(mask, 50, 70, "cpu")
    keep = keep.numpy()
    first, last = traffic.intervals(keep)
    found = traffic.tiles(first, last, 70, 16, 16)
    for row in range(4):
        for col in range(5):
            tile = keep[row * 16 : row * 16 + 16, col * 16 : col * 16 + 16]
            whole = tile.all() and tile.shape[1] == 16
            assert (found[row, col] == traffic.SKIPPED) == (not tile.any()), (row, col)
            assert (found[row, col] == traffic.CLEAR) == whole, (row, col)


def test_operations_by_hand():
    assert traffic.pairs(4, 4, causal=True) == 10
    assert traffic.pairs(4, 4, causal=True, window=2) == 7
    assert traffic.pairs(2, 5, causal=True) == 9
    n = traffic.pairs(8, 8)
    assert traffic.forward_flops(n, 4, 4) == 4 * 8 * 8 * 4
    assert traffic.backward_flops(n, 4, 4) * 2 == traffic.forward_flops(n, 4, 4) * 5
    assert traffic.issued_backward_flops(n, 4, 4) * 5 == traffic.backward_flops(n, 4, 4) * 7
    assert traffic.forward_bytes(1, 2, 1, 3, 5, 4, 4, 2) == (2 * 3 * 8 + 5 * 8) * 2 + 2 * 3 * 4


def test_benchmark_cases_run():
    """On tiny shapes in the interpreter: every kind of case, forward and backward, with torch beside it."""
    names, said = [], []
    ceilings = measured_ceilings("cpu", 1024, 16)
    for case in benchmark.cases("cpu", True, said.append, benchmark.SMALLEST, compiled=False):
        if "window" not in case.name:
            assert any(name.startswith("sdpa") for name in case.contenders), said
        for row in measure_case("attention", case, WallClock(), ceilings, "cpu", 1, 1):
            assert row["of_limit"] > 0
        names.append(case.name)
    assert len(names) == 8
