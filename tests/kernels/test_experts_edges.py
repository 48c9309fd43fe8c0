"""The experts at their boundary: errors, odd sizes, the module, exact answers, offsets beyond 2^31."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from kernels.experts import config, custom, launch, launch_routing, op, reference, traffic, witness
from kernels.experts.module import MixtureOfExperts
from minillm.autograd import Tensor
from minillm.nn.experts import MixtureOfExperts as OfMinillm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU: test_experts_gpu.py")


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def numbers(N, E, k, seed=0):
    return torch.rand(N, E, generator=torch.Generator().manual_seed(seed)).topk(k, dim=1).indices


def layer(**changed):
    given = {"x": normal(3, 4), "gates": torch.ones(3, 2), "w_in": normal(5, 6, 4), "w_down": normal(5, 4, 3),
             "experts": numbers(3, 5, 2), "capacity": None}  # fmt: skip
    return op.mixture_of_experts(**{**given, **changed})


# ---- errors


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: op.route(normal(4), None, 1), ValueError, r"the logits must be of shape \(N, E\)"),
        (lambda: op.route(normal(2, 4), None, 5), ValueError, r"k must be an integer in 1\.\.4"),
        (lambda: op.route(normal(2, 4), None, 0), ValueError, r"k must be an integer in 1\.\.4"),
        (lambda: op.route(normal(2, 4), normal(3), 1), ValueError, r"the bias must be of shape \(4,\)"),
        (lambda: op.route(normal(2, 4), None, 1, "argmax"), ValueError, "scoring"),
        (lambda: op.route(normal(2, 4).double(), None, 1), TypeError, "float32, float16 or bfloat16"),
        (lambda: op.route(normal(2, 4, dtype=torch.bfloat16), None, 1), TypeError, "bfloat16 needs a GPU"),
        (lambda: op.route(torch.empty(2, 5000), None, 1), ValueError, r"number of experts must be in 1\.\.4096"),
        (lambda: op.pack(torch.zeros(3), 2), ValueError, r"the experts must be of shape \(N, k\)"),
        (lambda: op.pack(torch.zeros(3, 1), 2), TypeError, "int64 or int32"),
        (lambda: op.pack(numbers(3, 2, 1), 0), ValueError, "n_experts must be an integer"),
        (lambda: op.pack(numbers(3, 2, 1), 2, 0), ValueError, "capacity must be a positive integer or None"),
        (lambda: op.grouped_linear(normal(3, 4), normal(2, 5, 3), torch.zeros(3, dtype=torch.int32)), ValueError,
         r"w must be of shape \(E, n, 4\)"),
        (lambda: op.grouped_linear(normal(3, 4), normal(2, 5, 4), torch.zeros(2, dtype=torch.int32)), ValueError,
         r"the offsets must be of shape \(3,\)"),
        (lambda: layer(x=normal(1, 3, 4)), ValueError, "Flatten batch and sequence first"),
        (lambda: layer(gates=torch.ones(3, 1)), ValueError, r"the gates must be of the experts' shape \(3, 2\)"),
        (lambda: layer(experts=numbers(4, 5, 2)), ValueError, r"the experts must be of shape \(3, k\)"),
        (lambda: layer(w_in=normal(5, 5, 4)), ValueError, "must be even"),
        (lambda: layer(w_down=normal(5, 4, 2)), ValueError, r"w_down must be of shape \(5, 4, 3\)"),
        (lambda: layer(w_in=normal(5, 6, 4).half()), TypeError, "of the dtype of x"),
        (lambda: layer(experts=torch.zeros(3, 2)), TypeError, "int64 or int32"),
        (lambda: MixtureOfExperts(4, 2, 3, 4), ValueError, "at most the number of experts, 3"),
        (lambda: MixtureOfExperts(4, 2, 3, 1, router="gshard"), ValueError, "router"),
        (lambda: MixtureOfExperts(4, 2, 3, 2, router="switch"), ValueError, "k must be 1"),
        (lambda: MixtureOfExperts(4, 2, 3, 2)(normal(2, 5)), ValueError, r"x must be of shape \(\.\.\., 4\)"),
    ],
)  # fmt: skip
def test_one_clear_error(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("function", "operand"),
    [
        (lambda t: op.route(t, None, 1)[3], normal(2, 4)),
        (lambda t: op.grouped_linear(t, normal(1, 3, 4), torch.tensor([0, 2])).sum(), normal(2, 4)),
        (lambda t: layer(x=t).sum(), normal(3, 4)),
    ],
)
def test_second_derivatives_are_refused_and_not_wrong(function, operand):
    x = operand.requires_grad_()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(function(x), x, create_graph=True)


# ---- odd sizes


@pytest.mark.parametrize(("E", "k"), [(1, 1), (9, 9), (513, 3), (600, 1)])
def test_few_and_many_experts(E, k):
    """k = E, and more experts than a power of two: the choice, the packing and the losses."""
    logits = torch.round(2 * normal(5, E)) / 2  # many ties
    gates, experts, loads, aux, z = op.route(logits, None, k)
    wanted = reference.route(Tensor(logits.numpy()), None, k, "softmax", True)
    assert np.array_equal(experts.numpy(), wanted[1])
    assert np.array_equal(loads.numpy(), wanted[2])
    np.testing.assert_allclose(gates.numpy(), wanted[0].numpy(), atol=1e-6)
    np.testing.assert_allclose([aux.item(), z.item()], [wanted[3].item(), wanted[4].item()], rtol=1e-5)
    for found, right in zip(op.pack(experts, E, 2), reference.pack(experts.numpy(), E, 2)):
        assert np.array_equal(found.numpy(), right)


def test_more_tokens_than_a_grid_axis_holds():
    """70,000 tokens: numbers alone, which is where 16 bits would show."""
    experts = numbers(70_000, 3, 1)
    order, places, offsets = launch_routing.pack(experts, 3, None, config.PackTile(4096, 16_384, 16))
    sort = torch.sort(experts[:, 0], stable=True)
    assert torch.equal(order.long(), sort.indices)
    assert torch.equal(order[places[:, 0].long()].long(), torch.arange(70_000))
    assert torch.equal(offsets[1:].long(), torch.bincount(experts[:, 0], minlength=3).cumsum(0))


def test_no_tokens():
    module = MixtureOfExperts(4, 3, 5, 2, n_shared=1, capacity_factor=1.0)
    record = []
    x = torch.zeros(0, 4, requires_grad=True)
    y = module(x, record)
    assert y.shape == (0, 4)
    (y.sum() + record[0].aux_loss + record[0].z_loss).backward()
    assert not module.w_in.grad.any()
    assert record[0].loads.tolist() == [0] * 5
    assert float(record[0].aux_loss.detach()) == 0


def test_ties_go_to_the_lower_number_and_nan_stays_in_range():
    logits = torch.tensor(
        [[1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [float("nan"), 1.0, float("-inf"), float("nan")]]
    )
    _, experts, *_ = op.route(logits, None, 3)
    assert experts.tolist() == [[1, 2, 0], [0, 1, 2], [1, 0, 2]]


def test_sum_and_backward():
    """The gradient of a sum has strides of 0."""
    leaves = [normal(6, 4), torch.rand(6, 2), normal(5, 6, 4), normal(5, 4, 3)]
    leaves = [t.requires_grad_() for t in leaves]
    y = op.mixture_of_experts(*leaves, numbers(6, 5, 2))
    expanded = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    for a, b in zip(expanded, torch.autograd.grad(y, leaves, torch.ones(6, 4))):
        assert torch.equal(a, b)


def test_idle_experts_get_gradients_of_exactly_zero():
    w_in, w_down = normal(5, 6, 4).requires_grad_(), normal(5, 4, 3).requires_grad_()
    layer(w_in=w_in, w_down=w_down, experts=torch.tensor([[0, 3]] * 3)).sum().backward()
    for grad in (w_in.grad, w_down.grad):
        assert (grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, False, True, False]


# ---- the module


@pytest.mark.parametrize(
    ("router", "k", "n_shared", "factor"),
    [("softmax", 2, 1, None), ("sigmoid", 2, 0, 0.6), ("switch", 1, 2, 1.0)],
)
@pytest.mark.equation("router-logits", "moe-shared-experts", "moe-capacity")
def test_module_is_minillms(router, k, n_shared, factor):
    """The same parameters, output, losses, drops and gradients as the layer on NumPy."""
    rng = np.random.default_rng(0)
    theirs = OfMinillm(12, 5, 4, k, rng, router=router, n_shared=n_shared, capacity_factor=factor, scale=1.5,
                       std=0.3, std_out=0.3)  # fmt: skip
    ours = MixtureOfExperts(12, 5, 4, k, router=router, n_shared=n_shared, capacity_factor=factor, scale=1.5)
    ours.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in theirs.state_dict().items()})
    x = rng.normal(size=(2, 7, 12)).astype(np.float32)
    recorded, record = [], []
    wanted, found = theirs(Tensor(x), recorded), ours(torch.from_numpy(x), record)
    np.testing.assert_allclose(found.detach().numpy(), wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(record[0].aux_loss.item(), recorded[0].aux_loss.item(), rtol=1e-5)
    np.testing.assert_allclose(record[0].dropped.item(), recorded[0].dropped, atol=1e-6)
    assert np.array_equal(record[0].loads.numpy(), recorded[0].loads)
    (found.square().sum() + record[0].aux_loss + record[0].z_loss).backward()
    ((wanted * wanted).sum() + recorded[0].aux_loss + recorded[0].z_loss).backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            right = dict(theirs.named_parameters())[name].grad.numpy()
            np.testing.assert_allclose(parameter.grad.numpy(), right, atol=2e-6 * max(np.abs(right).max(), 1))


@pytest.mark.equation("moe-bias-balancing")
def test_bias_moves_towards_even_loads():
    module = MixtureOfExperts(4, 2, 3, 1, router="sigmoid")
    module.update_bias(torch.tensor([6, 0, 3], dtype=torch.int32), 0.1)
    assert torch.allclose(module.bias, torch.tensor([-0.1, 0.1, 0.0]))
    assert not module.bias.requires_grad
    with pytest.raises(ValueError, match="'sigmoid'"):
        MixtureOfExperts(4, 2, 3, 1).update_bias(torch.zeros(3))
    assert "3 experts" in repr(module)


# ---- inside torch.compile


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_custom_ops_pass_torchs_own_check():
    experts = numbers(5, 4, 1)
    torch.library.opcheck(custom.route_op, (normal(5, 4).requires_grad_(), torch.zeros(4), 2, True, True))
    torch.library.opcheck(custom.pack_op, (experts, 4, 2))
    leaves = [t.requires_grad_() for t in (normal(5, 6), torch.rand(5, 1), normal(4, 8, 6), normal(4, 6, 4))]
    torch.library.opcheck(custom.experts_op, (*leaves, experts, 2))
    grouped = normal(5, 6).requires_grad_(), normal(2, 3, 6).requires_grad_(), torch.tensor([0, 2, 4])
    torch.library.opcheck(custom.grouped_linear_op, grouped)


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break_it_equals_eager():
    module = MixtureOfExperts(6, 4, 3, 2, capacity_factor=1.0)

    def function(x):
        record = []
        y = module(x, record)
        return y.square().sum() + record[0].aux_loss

    x = normal(5, 6).requires_grad_()
    leaves = (x, *module.parameters())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), function(x))
    for a, b in zip(torch.autograd.grad(compiled(x), leaves), torch.autograd.grad(function(x), leaves)):
        assert torch.equal(a, b)


# ---- exact answers


def test_witnesses_are_exact():
    wrong = {name: count for name, count in witness.witnesses("cpu") if count}
    assert not wrong


def test_witnesses_can_fail(monkeypatch):
    """The last row of every expert's tile lost, and the equality sees it."""
    honest = launch_routing.tiles

    def forgetful(*arguments):
        found = honest(*arguments)
        found[2] -= 1
        return found

    monkeypatch.setattr(launch, "tiles", forgetful)
    assert witness.wrong_layer("cpu", *witness.SIZES[0], torch.float32)


# ---- offsets beyond 2^31

FAR = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import numpy as np, torch
from kernels.experts import launch, launch_routing
stride = 2**30 + 8
memory = np.memmap(sys.argv[1], dtype=np.float16, mode="w+", shape=(2 * stride + 4096,))  # sparse: nothing is stored
def far(near, first):  # three rows, or three matrices, 2^30 elements apart
    there = torch.from_numpy(memory)[first:].as_strided(near.shape, (stride, *near.stride()[1:]))
    return there.copy_(near)
generator = torch.Generator().manual_seed(0)
def normal(*shape):
    return torch.randn(*shape, generator=generator).half()
x, w_in, w_down, dz = normal(3, 8), normal(3, 12, 8), normal(3, 8, 6), normal(3, 8)
gates, experts = torch.rand(3, 1, generator=generator), torch.tensor([[2], [0], [2]])
near = x, gates, w_in, w_down
apart = far(x, 0), gates, far(w_in, 100), far(w_down, 500)
z, kept = launch.layer(*near, experts, None)
z_far, kept_far = launch.layer(*apart, experts, None)
assert torch.equal(z, z_far)
for a, b in zip(launch.layer_backward(dz, *near, kept), launch.layer_backward(far(dz, 1000), *apart, kept_far)):
    assert torch.equal(a, b)
logits = normal(3, 5)
a, b = launch_routing.route(logits, None, 2, False, True), launch_routing.route(far(logits, 2000), None, 2, False, True)
assert all(torch.equal(s, t) for s, t in zip(a, b))
print("far and near agree")
"""


@pytest.mark.slow  # the interpreter goes over four gigabytes of nothing in every launch
def test_offsets_beyond_int32(tmp_path):
    """Tokens and experts' matrices 2^30 elements apart: a 32-bit product would wrap and read elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", FAR, str(tmp_path / "far")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "far and near agree", done.stderr[-2000:]


# ---- configuration and traffic are pure functions


def test_configuration_is_pure():
    for target in config.TARGETS:
        for rows, E in ((1, 1), (512, 128), (262_144, 128), (65_536, 8)):
            for itemsize in (2, 4):
                plan = config.plan(rows, E, itemsize, target)
                assert plan == config.plan(rows, E, itemsize, target)
                assert plan.up.block_m == plan.down.block_m
    for E in (1, 7, 128, 513, 4096):
        assert config.route_tile(E).block_t >= 1
        assert -(-100_000_000 // config.pack_tile(100_000_000, E).chunk) <= config.CHUNKS
    assert config.route_programs(1, config.route_tile(8), 132) == 1


def test_traffic_by_hand():
    assert traffic.layer_flops(10, 4, 3) == 10 * 3 * 2 * 4 * 3
    assert traffic.layer_flops(10, 4, 3, backward=True) == 2 * traffic.layer_flops(10, 4, 3)
    assert traffic.tiles_of([0, 1, 16, 17], 16) == 4
    assert traffic.padding_waste([0, 1, 16, 17], 16) == 1 - 34 / 64
    assert traffic.padding_waste([], 16) == 0
    assert traffic.combine_bytes(2, 3, 5, 2) == 2 * (30 + 10) + 8 * 6
    assert traffic.route_bytes(2, 3, 5, 2) == 20 + 48
    assert traffic.pack_bytes(2, 3, 5) == 4 * (24 + 6)
    assert traffic.product_bytes(2, 3, 5, 7, 2) == 2 * (16 + 105)
    assert traffic.layer_bytes(2, 1, 3, 4, 5, 2) == 2 * (16 + 180) + 16
    assert traffic.kept_bytes(2, 3, 5, 2) == 6 * 28
