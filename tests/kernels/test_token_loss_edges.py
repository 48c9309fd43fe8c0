"""The losses at their boundary: errors, odd calls, in place, memory, exact answers, many rows, offsets beyond int32."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from kernels import launching
from kernels.token_loss import benchmark, config, custom_ops, launch, launch_linear, op, prepare, traffic, witness
from kernels.token_loss.config import LinearPlan, LinearTile, RowTile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_token_loss_gpu.py")


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).to(dtype)


def ids(*shape, V=5):
    return torch.arange(int(np.prod(shape))).reshape(shape) % V


def policy(logits=None, targets=None, old=None, advantages=None, mask=None, ref=None, weights=None, **more):
    """A call with two responses of three tokens, whatever is not given."""
    pick = lambda x, other: other if x is None else x  # noqa: E731
    return op.policy_loss(
        pick(logits, normal(2, 3, 5)), pick(targets, ids(2, 3)), pick(old, torch.zeros(2, 3)),
        pick(advantages, torch.ones(2)), pick(mask, torch.ones(2, 3, dtype=torch.bool)), ref, weights, **more,
    )  # fmt: skip


CALLS = [
    (lambda: op.softmax(torch.tensor(1.0)), ValueError, r"softmax: logits must be of shape \(..., V\)"),
    (lambda: op.softmax(normal(2, 3).double()), TypeError, "float32, float16 or bfloat16"),
    (lambda: op.log_softmax(normal(2, 3, dtype=torch.bfloat16)), TypeError, "bfloat16 needs a GPU"),
    (lambda: op.cross_entropy(normal(2, 5), ids(3)), ValueError, r"targets must be of shape \(2,\)"),
    (lambda: op.cross_entropy(normal(2, 5), ids(2).float()), TypeError, "targets must be int64 or int32"),
    (lambda: op.cross_entropy(normal(2, 5), ids(2) + 4), IndexError, r"in \[0, 5\) or -100, got the id \[5\]"),
    (lambda: op.cross_entropy(normal(2, 5), -1 - ids(2)), IndexError, r"in \[0, 5\)"),
    (lambda: op.cross_entropy(normal(2, 5), ids(2), reduction="mean"), ValueError, "reduction must be one of"),
    (lambda: op.cross_entropy(normal(2, 5), ids(2), label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\]"),
    (lambda: op.cross_entropy(normal(2, 5), ids(2), z_loss=-1.0), ValueError, "z_loss must be at least 0"),
    (lambda: op.cross_entropy(normal(2, 0), ids(2)), ValueError, "V at least 1"),
    (lambda: op.token_logprobs(normal(2, 5), ids(2), 0.0), ValueError, "temperature must be a positive number"),
    (lambda: op.token_logprobs(normal(2, 5), ids(2), float("nan")), ValueError, "temperature must be a positive number"),
    (lambda: op.token_logprobs(normal(2, 5), ids(2).to("meta")), ValueError, "on the device of"),
    (lambda: policy(logits=normal(2, 5)), ValueError, r"logits must be of shape \(B, T, V\)"),
    (lambda: policy(old=torch.zeros(2, 2)), ValueError, r"old_logprobs must be of shape \(2, 3\)"),
    (lambda: policy(advantages=torch.ones(3)), ValueError, r"advantages must be of shape \(2, 3\) or \(2,\)"),
    (lambda: policy(mask=torch.ones(2, 2)), ValueError, r"the mask must be of shape \(2, 3\)"),
    (lambda: policy(mask=torch.full((2, 3), 0.5)), ValueError, "of booleans, zeros and ones"),
    (lambda: policy(beta=0.1), ValueError, "ref_logprobs must be given when beta is not 0"),
    (lambda: policy(kl="k4"), ValueError, "kl must be one of"),
    (lambda: policy(level="word"), ValueError, "level must be one of"),
    (lambda: policy(reduction="mean"), ValueError, "reduction must be one of"),
    (lambda: policy(reduction="constant"), ValueError, "length must be the largest response length"),
    (lambda: policy(reduction="sum", divisor=2.0), ValueError, "divisor must be positive, and left out"),
    (lambda: policy(clip_low=1.5), ValueError, "the clip widths must be low in"),
    (lambda: policy(dual_clip=1.1), ValueError, r"dual_clip must be above the upper clip bound 1\.2"),
    (lambda: policy(targets=ids(2, 3) + 3), IndexError, r"in \[0, 5\)"),
    (lambda: op.linear_cross_entropy(normal(2, 4), normal(5, 3), ids(2)), ValueError, r"hidden must be of shape \(..., 3\)"),
    (lambda: op.linear_cross_entropy(normal(2, 4), normal(4), ids(2)), ValueError, r"weight must be of shape \(V, d\)"),
    (lambda: op.linear_cross_entropy(normal(2, 4), normal(5, 4, dtype=torch.float16), ids(2)), TypeError, "dtype"),
    (lambda: op.cross_entropy(normal(1, 5).requires_grad_().expand(2, 5), ids(2), inplace=True), ValueError, "memory of their own"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), CALLS)
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_without_interpreter_or_gpu_the_error_says_how(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"logits must be on a GPU, got a tensor on cpu\. Set TRITON_INTERPRET=1"):
        op.softmax(normal(2, 4))


@pytest.mark.parametrize("loss", [
    lambda z: op.softmax(z).sum(), lambda z: op.cross_entropy(z, ids(2)), lambda z: op.token_logprobs(z, ids(2))[0].sum(),
    lambda z: op.cross_entropy(z * 1, ids(2), inplace=True), lambda z: op.linear_cross_entropy(z, normal(5, 5), ids(2)),
])  # fmt: skip
def test_second_derivatives_are_refused_and_not_wrong(loss):
    z = normal(2, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss(z), z, create_graph=True)


# ---- odd calls


def test_an_id_outside_is_loud_where_ids_are_not_looked_at(monkeypatch):
    """On a GPU ids are not brought to the host: such a row is NaN, and nothing outside the row is read."""
    monkeypatch.setattr(prepare, "_check_ids", lambda *a: None)
    logp, lse, _ = op.token_logprobs(normal(2, 5), torch.tensor([1, 7]))
    assert torch.isnan(logp[1]) and torch.isfinite(logp[0]) and torch.isfinite(lse).all()
    assert torch.isnan(op.linear_token_logprobs(normal(2, 5), normal(5, 5), torch.tensor([1, 7]))[0][1])


def test_nan_in_a_row_that_counts_stays_nan():
    z = normal(2, 5)
    z[1, 3] = float("nan")
    for found in op.token_logprobs(z, ids(2)):
        assert torch.isnan(found[1]) and torch.isfinite(found[0])
    assert torch.isnan(op.cross_entropy(z, ids(2)))


def test_parts_of_the_statistics_may_be_used_alone():
    z = normal(3, 7).requires_grad_()
    for index, reference in enumerate((
        lambda x: torch.log_softmax(x, -1).gather(-1, ids(3)[:, None])[:, 0], lambda x: torch.logsumexp(x, -1),
        lambda x: -(torch.softmax(x, -1) * torch.log_softmax(x, -1)).sum(-1),
    )):  # fmt: skip
        ours = torch.autograd.grad(op.token_logprobs(z, ids(3))[index].sum(), z)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(reference(z).sum(), z)[0], atol=2e-6, rtol=0)


def test_frozen_factors_get_no_gradient():
    h, w = normal(3, 4), normal(5, 4).requires_grad_()
    op.linear_cross_entropy(h, w, ids(3)).backward()
    assert h.grad is None and w.grad is not None
    h, w = h.requires_grad_(), w.detach()
    op.linear_cross_entropy(h, w, ids(3)).backward()
    assert h.grad is not None and w.grad is None


def test_ids_of_32_bits_and_a_vocabulary_of_two():
    z = normal(4, 2)
    expected = torch.nn.functional.cross_entropy(z, ids(4, V=2))
    torch.testing.assert_close(op.cross_entropy(z, ids(4, V=2).int()), expected, atol=1e-6, rtol=0)


def test_module():
    z = normal(3, 5).requires_grad_()
    loss = op.CrossEntropyLoss(label_smoothing=0.1)(z, ids(3))
    torch.testing.assert_close(loss, torch.nn.CrossEntropyLoss(label_smoothing=0.1)(z, ids(3)), atol=1e-6, rtol=0)


# ---- in place


def test_in_place_the_logits_become_their_gradient_and_only_once():
    leaf = normal(3, 5).requires_grad_()
    z = leaf * 1
    loss = op.cross_entropy(z, ids(3), inplace=True)
    expected = torch.autograd.grad(op.cross_entropy(leaf, ids(3)), leaf)[0]
    torch.testing.assert_close(z.detach(), expected, atol=1e-7, rtol=0)
    (2 * loss).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 2 * expected)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


def test_in_place_whoever_else_kept_the_logits_is_told():
    z = normal(3, 5).requires_grad_() * 1
    other = op.token_logprobs(z, ids(3))[0].sum()
    loss = op.cross_entropy(z, ids(3), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + loss).backward()


def test_in_place_under_the_tracer_is_the_ordinary_loss():
    leaf, t = normal(3, 5).requires_grad_(), ids(3)
    compiled = torch.compile(lambda z: op.cross_entropy(z, t, inplace=True), fullgraph=True, backend="aot_eager")
    before = leaf.detach().clone()
    assert torch.equal(compiled(leaf), op.cross_entropy(leaf, t))
    assert torch.equal(leaf.detach(), before)


def test_in_place_without_a_gradient_wanted_leaves_the_logits_alone():
    z = normal(3, 5)
    before = z.clone()
    op.cross_entropy(z, ids(3), inplace=True)
    with torch.no_grad():
        op.cross_entropy(z.requires_grad_(), ids(3), inplace=True)
    assert torch.equal(z.detach(), before)


# ---- memory


def test_extra_memory_is_that_of_the_formula(monkeypatch):
    """Every buffer of the fused forward and backward, counted, beside what `traffic.py` publishes."""
    made = []
    honest = launching.empty

    def counted(shape, dtype, device):
        made.append((int(np.prod(shape)) * dtype.itemsize, tuple(shape), dtype))
        return honest(shape, dtype, device)

    monkeypatch.setattr(launching, "empty", counted)
    tile = LinearTile(16, 16, 16, 1, 1)
    for dtype, chunk in ((torch.float32, 32), (torch.float16, 32), (torch.float16, 112)):
        N, V, d = 20, 100, 24
        plan = LinearPlan(tile, tile, tile, 3, chunk)
        h, w, t = normal(N, d, dtype=dtype), normal(V, d, dtype=dtype), ids(N)
        forward, backward = traffic.extra_bytes_of_plan(N, d, V, dtype.itemsize, plan)
        made.clear()
        found = launch_linear.statistics(h, w, t, 1.0, -100, plan=plan)
        assert sum(size for size, *_ in made) == forward
        made.clear()
        column = torch.ones(N)
        launch_linear.gradient(h, w, t, found, (column, column, None, None), 1.0, -100, plan)
        assert sum(size for size, *_ in made) == backward + (N + V) * d * dtype.itemsize
        assert not any(shape == (N, V) for _, shape, _ in made)  # logits are nowhere


def test_extra_memory_of_the_goal():
    """8192 rows of width 4096 before 128k ids in bf16: at most 256 MiB beside operands and gradients, in both directions."""
    plan = config.linear_plan(8192, 4096, 128_256, 2, 132)
    forward, backward = traffic.extra_bytes_of_plan(8192, 4096, 128_256, 2, plan)
    assert forward < 8 << 20
    assert backward <= 256 << 20
    assert 7 * backward < 8192 * 128_256 * 2  # what the logits would have taken


# ---- torch.compile


@pytest.mark.filterwarnings("ignore")
def test_custom_ops_pass_torchs_own_check():
    z, t = normal(3, 7).requires_grad_(), ids(3)
    torch.library.opcheck(custom_ops.softmax_op, (z, True))
    torch.library.opcheck(custom_ops.statistics_op, (z, t, 0.7, -100, True))
    torch.library.opcheck(custom_ops.linear_statistics_op, (normal(3, 4).requires_grad_(), normal(7, 4).requires_grad_(), t, 1.0, -100, False))  # fmt: skip
    row = torch.rand(3, requires_grad=True)
    numbers = [0.0, 0.0, 0.8, 1.2, float("inf"), 0.1, 0.01]
    data = (row, row, row, None, t, torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), None)
    torch.library.opcheck(custom_ops.terms_op, (*data, numbers, "k3", False, "token", 3, -100))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("linear", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_without_a_graph_break_it_equals_eager(linear):
    w = normal(5, 4).requires_grad_()
    old, a, mask = torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3, dtype=torch.bool)

    def function(h):
        if linear:
            found = op.linear_policy_loss(h, w, ids(2, 3), old, a, mask, old, beta=0.1, entropy_coef=0.01)
            return found.loss + op.linear_cross_entropy(h, w, ids(2, 3), label_smoothing=0.1)
        z = op.log_softmax(h @ w.T)
        return op.policy_loss(z, ids(2, 3), old, a, mask).loss + op.cross_entropy(z, ids(2, 3))

    h = normal(2, 3, 4).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h), function(h))
    for x, y in zip(torch.autograd.grad(compiled(h), (h, w)), torch.autograd.grad(function(h), (h, w))):
        torch.testing.assert_close(x, y, atol=1e-7, rtol=0)


# ---- exact answers, many rows, far rows


def test_witnesses_are_exact():
    assert not {name: count for name, count in witness.witnesses("cpu") if count}


def test_witnesses_can_fail(monkeypatch):
    honest = launch.gradient
    monkeypatch.setattr(launch, "gradient", lambda *a, **k: honest(*a, **k) * (1 + 2.0**-10))
    assert witness.rows_wrong("cpu", 16, torch.float32)
    product = launch_linear._multiply
    monkeypatch.setattr(launch_linear, "_multiply", lambda a, b, *rest: product(a[:, :-1], b[:-1], *rest))
    assert witness.head_wrong("cpu", 20, 40, 24, torch.float32, witness.SMALL_LINEAR)


def test_more_rows_than_a_second_grid_axis_holds():
    """70,000 rows in one call, all on grid axis 0 (tall tiles, so that the interpreter needs 35 programs)."""
    z, t = normal(70_000, 3), ids(70_000, V=3)
    found = launch.statistics(z, t, 1.0, -100, tile=RowTile(2048, 16, 4))
    expected = torch.log_softmax(z, -1).gather(-1, t[:, None])[:, 0]
    torch.testing.assert_close(found.logp, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("V", [262_144, 262_143])
def test_a_vocabulary_of_a_quarter_million(V):
    """Many tiles a row, with and without rows that begin at multiples of 16 bytes: statistics, loss and gradient."""
    z, t = normal(2, V).half().requires_grad_(), ids(2, V=V)
    loss = op.cross_entropy(z, t)
    (dz,) = torch.autograd.grad(loss, z)
    exact = z.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, t)
    (wanted,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(dz.double(), wanted, atol=2.0**-24, rtol=2e-3)
    logp, lse, entropy = op.token_logprobs(z, t)
    log_p = torch.log_softmax(exact, -1)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=5e-5, rtol=0)
    torch.testing.assert_close(lse.double(), torch.logsumexp(exact, -1), atol=2e-5, rtol=0)
    torch.testing.assert_close(logp.double(), log_p.gather(-1, t[:, None])[:, 0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("function", ["loss_and_gradient", "gradient"])
def test_a_launch_in_place_refuses_rows_that_are_a_copy(function):
    z = normal(2, 3, 4).transpose(0, 1)
    t, weight, found = ids(6, V=4), torch.ones(6), launch.statistics(z, ids(6, V=4), 1.0, -100)
    how = (weight, launch.LikelihoodTerms()) if function == "loss_and_gradient" else (found, (weight, None, None, None))
    with pytest.raises(ValueError, match="rows are a view"):
        getattr(launch, function)(z, t, *how, 1.0, -100, True)


FAR = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import numpy as np, torch
from kernels.token_loss import launch, launch_linear
from kernels.token_loss.config import LinearPlan, LinearTile
stride = 2**30 + 8
memory = np.memmap(sys.argv[1], dtype=np.float16, mode="w+", shape=(2 * stride + 64,))  # sparse: nothing is stored
memory[2 * stride : 2 * stride + 5] = [1, 2, 3, 4, 5]
z = torch.from_numpy(memory).as_strided((3, 5), (stride, 1))
t, w = torch.tensor([0, 1, 2]), torch.ones(3)
tile = LinearTile(16, 16, 16, 1, 1)
plan = LinearPlan(tile, tile, tile, 1, 16)
for logits in (z, torch.from_numpy(memory).as_strided((3, 3), (8, stride))):
    near = logits.contiguous()
    a, b = (launch.statistics(x, t, 1.0, -100) for x in (logits, near))
    assert torch.equal(a.logp, b.logp) and torch.equal(a.entropy, b.entropy)
    c = (w, w, None, None)
    assert torch.equal(launch.gradient(logits, t, a, c, 1.0, -100), launch.gradient(near, t, b, c, 1.0, -100))
    head = torch.eye(logits.shape[1], dtype=torch.float16)[: max(logits.shape[1], 3)]
    a, b = (launch_linear.statistics(x, head, t, 1.0, -100, plan=plan) for x in (logits, near))
    assert torch.equal(a.logp, b.logp)
    both = [launch_linear.gradient(x, head, t, a, c, 1.0, -100, plan) for x in (logits, near)]
    assert all(torch.equal(x, y) for x, y in zip(*both))
print("far and near agree")
"""


def test_offsets_beyond_int32(tmp_path):
    """Rows, then columns, 2^30 elements apart in a sparse file: a 32-bit product would wrap and read elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", FAR, str(tmp_path / "far")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "far and near agree", done.stderr[-2000:]


# ---- configuration and traffic are pure functions


def test_configuration_is_pure_and_keeps_rows_in_the_cache():
    for V in (2, 3, 16, 1000, 4096, 4097, 16_384, 16_385, 32_000, 50_257, 128_256, 262_144):
        for size in (2, 4):
            tile = config.row_tile(V, size)
            assert tile == config.row_tile(V, size)
            assert config.loss_tile(V, size).covers(V) == (V <= config.WHOLE_LIMIT)
            assert tile.block_rows * tile.block_v >= 512
    assert config.row_tile(128_256, 2).warps == 32  # one program a multiprocessor:
    assert config.L2_BUDGET > 132 * 128_256 * 2  # then the rows in flight fit


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("n_rows", [1, 300, 8192, 100_000])
def test_plans_cover_the_vocabulary(target, n_rows):
    for d, V in ((4096, 128_256), (100, 5), (24, 50_257)):
        for size in (2, 4):
            plan = config.linear_plan(n_rows, d, V, size, 132, target)
            assert plan == config.linear_plan(n_rows, d, V, size, 132, target)
            assert 1 <= plan.splits <= -(-V // plan.forward.block_n)
            assert plan.chunk % plan.gradient.block_n == 0 and plan.chunk % plan.product.block_k == 0
            assert n_rows * plan.chunk * size <= max(config.CHUNK_BYTES, n_rows * 128 * size)


def test_bytes_by_hand():
    assert traffic.statistics_bytes(10, 64, 2) == 10 * (128 + 8 + 20)
    assert traffic.loss_bytes(10, 64, 2, policy=False) == 10 * (256 + 8 + 16)
    assert traffic.split_loss_bytes(10, 64, 2, policy=True) == 10 * (384 + 8 + 52)
    assert traffic.linear_flops(2, 3, 5, backward=True) == 4 * 60
    assert traffic.softmax_backward_bytes(10, 64, 4) == 3 * 10 * 256


# ---- the benchmark's machinery


def test_every_case_of_the_benchmark_runs():
    """On tiny shapes in the interpreter, torch beside ours; only a GPU can say how long they take."""
    small = benchmark.SMALLEST_SHAPES, benchmark.SMALLEST_LINEAR
    names = set()
    for case in benchmark.cases("cpu", True, lambda text: None, *small, compiled=False):
        assert "ours" in case.contenders and case.bytes > 0, case.name
        assert "torch" in case.contenders or "two launches" in case.name, case.name
        for call in case.contenders.values():
            call()
        names.add(case.name)
    assert len(names) == 9


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch):
    said = []
    monkeypatch.setattr(benchmark, "_torch_cross_entropy", lambda z, t: 2 * torch.nn.functional.cross_entropy(z, t))
    z, t = normal(4, 8).requires_grad_(), ids(4)
    first, _ = benchmark._likelihood(z, t, said.append, False)
    assert set(first.contenders) == {"ours"} and "differs" in said[0]


def test_sweeps_hold_the_shipped_sizes():
    cases = list(benchmark.sweep_cases("cpu", ((2, 64),), ((4, 16, 64),)))
    assert len(cases) == 3 and all(len(case.contenders) > 1 for case in cases)
    assert str(config.row_tile(64, 4)) in cases[0].contenders and str(config.loss_tile(64, 4)) in cases[1].contenders
