"""Decoding at its boundary: errors, the custom ops, exact answers, plans, offsets beyond 2^31."""

import subprocess
import sys

import pytest
import torch

from kernels import launching
from kernels.decode import config, launch, op, traffic, witness

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_decode_gpu.py")


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).to(dtype)


Q, K, V = (2, 4, 1, 8), (2, 2, 5, 8), (2, 2, 5, 6)


def decode(q=Q, k=K, v=V, **options):
    made = [t if isinstance(t, torch.Tensor) else normal(*t) for t in (q, k, v)]
    return op.decode_attention(*made, **options)


# ---- errors


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: decode(q=(2, 4, 8)), ValueError, r"q must be of shape \(B, H, L_q, d\)"),
        (lambda: decode(k=(2, 2, 5, 7)), ValueError, r"k must be of shape \(..., H_kv, capacity, d=8\)"),
        (lambda: decode(v=(2, 2, 4, 6)), ValueError, r"v must be of shape \(2, 2, 5, 'd_v'\)"),
        (lambda: decode(q=(2, 3, 1, 8)), ValueError, "H_kv must be a positive divisor of H = 3"),
        (lambda: decode(q=(3, 4, 1, 8)), ValueError, "a cache of B = 3 sequences"),
        (lambda: decode(q=normal(*Q, dtype=torch.float16)), TypeError, "of the queries' dtype torch.float16"),
        (lambda: decode(q=normal(*Q).double()), TypeError, "float32, float16 or bfloat16"),
        (lambda: decode(q=normal(*Q, dtype=torch.bfloat16)), TypeError, "bfloat16 needs a GPU"),
        (lambda: decode(window=0), ValueError, "window must be"),
        (lambda: decode(softcap=-1.0), ValueError, "softcap must be"),
        (lambda: decode(scale=float("nan")), ValueError, "scale must be a finite number"),
        (lambda: decode(lengths=torch.ones(2)), TypeError, "int32 or int64"),
        (lambda: decode(lengths=torch.ones(3, dtype=torch.int32)), ValueError, r"lengths must be of shape \(B=2,\)"),
        (lambda: decode(q=normal(*Q).requires_grad_()), RuntimeError, "has no gradient.*train with kernels.attention"),
        (lambda: decode(k=normal(*K).to("meta")), ValueError, "on the device of q, cpu"),
        (
            lambda: op.latent_decode_attention(normal(2, 4, 1, 8), normal(2, 5, 8), None, 9),
            ValueError, "d_v must be at most the width of c, 8",
        ),
        (
            lambda: op.paged_decode_attention(normal(*Q), normal(*K), normal(*V), None, torch.zeros(1, 2, dtype=torch.int32)),
            ValueError, r"the table must be of shape \(B=2, n\)",
        ),
        (lambda: op.merge_attention(normal(3, 2, 4), normal(3, 3)), ValueError, r"lse must be of shape \(3, 2\)"),
        (lambda: op.merge_attention(normal(3, 2, 4), normal(3, 2).half()), TypeError, "lse must be float32"),
    ],
)  # fmt: skip
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_without_interpreter_or_gpu_the_error_says_how(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"q must be on a GPU, got a tensor on cpu\. Set TRITON_INTERPRET=1"):
        decode()


def test_a_frozen_call_needs_no_gradient():
    with torch.no_grad():
        o, _ = decode(q=normal(*Q).requires_grad_())
    assert not o.requires_grad


# ---- odd calls


def test_lengths_beyond_the_capacity_count_as_it_and_negative_ones_as_none():
    lengths = torch.tensor([99, -3], dtype=torch.int64)
    o, lse = decode(lengths=lengths)
    full, full_lse = decode()
    assert torch.equal(o[0], full[0]) and torch.equal(lse[0], full_lse[0])
    assert not o[1].any() and (lse[1] == -torch.inf).all()


def test_the_module_refuses_more_than_its_room_and_forgets():
    module = op.DecodeAttention(1, 2, 4, 8, 6, window=3)
    q, k, v = normal(1, 4, 3, 8), normal(1, 2, 3, 8), normal(1, 2, 3, 6)
    first = module(q, k, v)
    with pytest.raises(ValueError, match="at most 4"):
        module(q, k, v)
    module.reset()
    assert torch.equal(module(q, k, v), first)
    assert "used=3" in repr(module) and not module.state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["plain", "paged", "latent", "merge"])
def test_custom_ops_pass_torchs_own_check(form):
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    if form == "merge":
        torch.library.opcheck(op.merge_op, (normal(3, 2, 4), normal(3, 2)))
    elif form == "latent":
        torch.library.opcheck(op.latent_op, (normal(2, 4, 1, 8), normal(2, 5, 8), lengths, 6, 0.5, None, None, None))
    else:
        table = torch.tensor([[1], [0]], dtype=torch.int32) if form == "paged" else None
        torch.library.opcheck(op.decode_op, (normal(*Q), normal(*K), normal(*V), lengths, table, 0.5, 2, 3.0, None))


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break_it_equals_eager():
    def function(q, k, v):
        o, lse = op.decode_attention(q, k, v, softcap=4.0)
        return op.merge_attention(torch.stack([o, 2 * o]), torch.stack([lse, lse + 1]))

    operands = normal(*Q), normal(*K), normal(*V)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*operands), function(*operands)):
        assert torch.equal(a, b)


# ---- exact answers


def test_witnesses_are_exact():
    wrong = {name: count for name, count in witness.witnesses("cpu") if count}
    assert not wrong


def test_witnesses_can_fail(monkeypatch):
    """The newest key left out, and the equality sees it."""
    honest = launch.decode
    monkeypatch.setattr(launch, "decode", lambda q, k, v, lengths, *rest: honest(q, k, v, lengths - 17, *rest))
    assert any(witness.wrong("cpu", shape, torch.float32, "plain", None) for shape in witness.SHAPES)


# ---- plans and traffic are pure functions


@pytest.mark.parametrize(("programs", "tiles"), [(1, 512), (8, 64), (64, 500), (264, 10), (5000, 100), (1, 1), (3, 0)])
def test_splits_fill_the_machine_and_no_more(programs, tiles):
    splits = config.choose_splits(programs, tiles, 132)
    assert splits == config.choose_splits(programs, tiles, 132)
    assert 1 <= splits <= max(tiles, 1)
    if programs >= 264:
        assert splits <= 2
    if programs == 1 and tiles == 512:
        assert splits >= 132  # a single sequence uses every multiprocessor


def test_widths_waste_no_tile():
    for d, d_v, latent, wanted in (
        (128, 128, False, (128, 128, 0, 128)), (192, 128, False, (128, 128, 64, 128)), (576, 512, True, (512, 512, 64, 512)),
        (80, 80, False, (64, 64, 16, 128)), (24, 8, False, (24, 32, 0, 16)), (1, 1, False, (1, 16, 0, 16)),
        (16, 16, True, (16, 16, 0, 16)),
    ):  # fmt: skip
        w = config.widths(d, d_v, latent)
        assert (w.main, w.block, w.rest, w.block_v) == wanted
        assert w.block >= w.main and (w.rest == 0) == (w.main == d)


def test_plans_fit_the_shared_memory_of_every_target():
    for rows in (1, 8, 64, 200):
        for d, d_v, latent in ((64, 64, False), (128, 128, False), (256, 256, False), (576, 512, True)):
            for amd, limit in ((False, 166_912), (True, 65_536)):
                plan = config.plan_for(8, rows, 4096, d, d_v, 2, 132, latent, False, amd)
                tile = traffic.issued(plan, config.widths(d, d_v, latent), 2, latent)
                assert tile * (plan.stages - 1) <= limit


def test_compulsory_bytes_by_hand():
    keys = 10 + 20
    rows = 2 * 4 * 1
    assert traffic.decode_bytes([10, 20], 4, 2, 1, 8, 6, 2) == keys * 2 * 14 * 2 + rows * (14 * 2 + 4)
    assert traffic.decode_bytes([10, 20], 4, 1, 1, 8, 6, 2, latent=True) == keys * 8 * 2 + rows * (14 * 2 + 4)
    assert traffic.decode_bytes([10, 20], 4, 2, 1, 8, 6, 2, window=5) == 10 * 2 * 14 * 2 + rows * (14 * 2 + 4)
    assert traffic.decode_flops([10], 4, 1, 8, 6) == 2 * 10 * 4 * 14
    assert traffic.part_bytes(2, 4, 1, 6, 1) == 0


FAR = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import numpy as np, torch
from kernels.decode import launch
from kernels.decode.config import Plan
stride = 2**30 + 8
memory = np.memmap(sys.argv[1], dtype=np.float16, mode="w+", shape=(2 * stride + 64,))  # sparse: nothing is stored
for n in range(3):
    memory[n * stride : n * stride + 4] = [n + 1, 1, -n, 2]
plan = Plan(16, 16, 2, 1, 1)
for shape, strides in (((1, 1, 3, 4), (0, 0, stride, 1)), ((1, 3, 1, 4), (0, stride, 0, 1)), ((3, 1, 1, 4), (stride, 0, 0, 1)),
                       ((1, 1, 4, 3), (0, 0, 1, stride))):
    far = torch.from_numpy(memory).as_strided(shape, strides)
    near = far.contiguous()
    q = torch.ones(shape[0], shape[1], 1, shape[3], dtype=torch.float16)
    a = launch.decode(q, far, far, None, None, 0.5, None, None, plan=plan)
    b = launch.decode(q, near, near, None, None, 0.5, None, None, plan=plan)
    assert all(torch.equal(x, y) for x, y in zip(a, b)), shape
print("far and near agree")
"""


def test_offsets_beyond_int32(tmp_path):
    """Tokens, heads, sequences, then columns 2^30 elements apart in a sparse file: a 32-bit product would wrap."""
    done = subprocess.run(
        [sys.executable, "-c", FAR, str(tmp_path / "far")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "far and near agree", done.stderr[-2000:]
