"""The layer of experts: every router, capacity, shared experts, its record, and transformers' Mixtral layer."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad, gradcheck
from minillm.functional.load_figures import Arrangement, load_figures, moe_parameters
from minillm.nn.experts import OVERFLOWS, ROUTERS, MixtureOfExperts

D, D_FF, E = 6, 5, 4


def layer(router="softmax", seed=0, **settings) -> MixtureOfExperts:
    k = settings.pop("k", {"switch": 1, "gshard": 2}.get(router, 2))
    made = MixtureOfExperts(D, D_FF, E, k, np.random.default_rng(seed), router=router, std=0.4, std_out=0.4, **settings)
    return made


def tokens(*shape, seed=1) -> Tensor:
    return Tensor(np.random.default_rng(seed).normal(size=(*shape, D)).astype(np.float32))


@pytest.mark.equation("moe-output", "gating-softmax", "gating-sigmoid", "switch-top1", "moe-gshard-top2")
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shape", [(2, 3), (5,), (1, 1), (0,)])
def test_every_router_runs_keeps_the_shape_and_records(router, shape):
    record = []
    x = tokens(*shape)
    y = layer(router)(x, record, np.random.default_rng(2))
    assert y.shape == x.shape and y.dtype == np.float32 and np.isfinite(y.data).all()
    (routing,) = record
    N = int(np.prod(shape))
    assert routing.p.shape == (N, E) and routing.dropped == 0
    assert routing.loads.sum() <= 2 * N
    if N:
        np.testing.assert_allclose(routing.p.data.sum(-1), 1, rtol=1e-6)
        assert float(routing.aux_loss) > 0 and float(routing.z_loss) >= 0


@pytest.mark.equation("moe-output")
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "switch", "gshard"])
def test_gradients_of_the_layer_are_those_of_finite_differences(router):
    moe = layer(router, n_shared=1, scale=1.5)
    for name, value in moe.named_parameters():
        setattr(moe, name, Tensor(value.data.astype(np.float64)))

    def run(x, w_router):
        moe.w_router = w_router
        return moe(x)

    points = [tokens(3).data.astype(np.float64), moe.w_router.data]
    assert gradcheck(run, points, {}, rng=np.random.default_rng(0)).passed


@pytest.mark.equation("router-mlp")
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "switch", "gshard"])
def test_a_router_may_have_a_hidden_layer_which_learns_too(router):
    """Erratum 36: one linear map is the default, a small network the option."""
    moe, x, record = layer(router, router_hidden=7), tokens(9), []
    assert moe.w_router_hidden is not None and layer(router).w_router_hidden is None
    y = moe(x, record)
    z = x.data @ moe.w_router_hidden.data.T
    np.testing.assert_allclose(record[0].logits.data, z / (1 + np.exp(-z)) @ moe.w_router.data.T, rtol=1e-4, atol=1e-6)
    assert np.abs(grad((y * y).sum(), moe.w_router_hidden).data).max() > 1e-4
    assert set(moe.state_dict()) - set(layer(router).state_dict()) == {"w_router_hidden"}


@pytest.mark.equation("moe-shared-experts", "moe-params-active")
def test_parameters_are_as_counted_and_shared_experts_add_their_part():
    for router, bias in (("softmax", False), ("sigmoid", True)):
        moe = layer(router, n_shared=2)
        assert moe.count_parameters() == moe_parameters(Arrangement(E, 2, D_FF, 2), D, bias=bias).total
    x = tokens(4)
    moe = layer(n_shared=2)
    whole = moe(x).data.copy()
    moe.n_shared = 0
    first, second = [], []
    for s, part in ((0, first), (1, second)):  # each shared expert by itself
        v, g = moe.shared_in.data[: 2 * D_FF], moe.shared_in.data[2 * D_FF :]
        rows = slice(s * D_FF, (s + 1) * D_FF)
        z = x.data @ g[rows].T
        part.append((x.data @ v[rows].T * z / (1 + np.exp(-z))) @ moe.shared_down.data[:, rows].T)
    np.testing.assert_allclose(moe(x).data + first[0] + second[0], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.equation("noisy-topk-gating")
def test_noise_only_where_a_generator_is_given():
    moe, x = layer("noisy"), tokens(50)
    quiet = moe(x).data
    np.testing.assert_array_equal(quiet, moe(x).data)
    assert np.abs(moe(x, rng=np.random.default_rng(0)).data - quiet).max() > 1e-3


@pytest.mark.equation("moe-capacity", "moe-drop", "moe-reroute")
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("router", ["softmax", "switch", "sigmoid"])
def test_capacity_bounds_what_an_expert_serves(router, overflow):
    moe, record = layer(router, capacity_factor=1.0, overflow=overflow, seed=3), []
    y = moe(tokens(2, 20), record)
    (routing,) = record
    assert (routing.served.sum(0) <= np.ceil(40 * moe.k / E)).all() and np.isfinite(y.data).all()
    free = layer(router, seed=3)
    full = free(tokens(2, 20)).data.reshape(40, D)
    same = (routing.served == routing.routed).all(1)
    assert 0 < same.sum() < 40
    np.testing.assert_allclose(y.data.reshape(40, D)[same], full[same], rtol=1e-4, atol=1e-6)
    if overflow == "reroute" and moe.k == 1:
        assert routing.dropped == 0
    if overflow == "drop":
        assert routing.dropped > 0


@pytest.mark.equation("moe-bias-balancing")
def test_the_bias_is_saved_gets_no_gradient_and_evens_out_the_loads():
    moe, x = layer("sigmoid", seed=5), tokens(300) + 1.0  # tokens with something in common crowd
    assert "bias" in moe.state_dict()
    found = grad((moe(x) * x).sum(), moe.parameters(), allow_unused=True)
    assert [g is None for g in found] == [p is moe.bias for p in moe.parameters()]
    record = []
    moe(x, record)
    before = load_figures(record[-1].loads)
    for _ in range(300):
        moe(x, record)
        moe.update_bias(record[-1].loads, 2e-3)
    after = load_figures(record[-1].loads)
    assert after.max_over_mean < 1.1 and before.max_over_mean > 1.3


BAD = [
    ({"k": 5}, "k must be at most the number of experts, 4"),
    ({"k": 0}, "k must be a positive integer"),
    ({"router": "random"}, "router must be one of"),
    ({"router": "switch", "k": 2}, "k must be 1 for the router 'switch'"),
    ({"router": "gshard", "k": 1}, "k must be 2 for the router 'gshard'"),
    ({"overflow": "spill"}, "overflow must be one of"),
    ({"activation": "tanh"}, "activation must be one of"),
    ({"capacity_factor": 0}, "capacity_factor must be a positive number"),
    ({"n_shared": -1}, "n_shared must be a non-negative integer"),
    ({"scale": 0}, "scale must be a positive number"),
    ({"router_hidden": 0}, "router_hidden must be a positive integer, got 0"),
    ({"router": "noisy", "router_hidden": 3}, "router_hidden must be None for the router 'noisy', got 3"),
]


@pytest.mark.equation("moe-output")
@pytest.mark.parametrize(("settings", "words"), BAD)
def test_bad_settings_give_one_clear_error(settings, words):
    with pytest.raises(ValueError, match=words):
        layer(**settings)


def test_other_bad_input():
    for sizes in ((0, 4, 4, 1), (4, 0, 4, 1), (4, 4, 0, 1)):
        with pytest.raises(ValueError, match="must be a positive integer"):
            MixtureOfExperts(*sizes, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"x must be of shape \(..., 6\)"):
        layer()(Tensor(np.ones((2, 5), np.float32)))
    with pytest.raises(ValueError, match="which has a bias"):
        layer().update_bias(np.ones(E))


@pytest.mark.equation("topk-renormalise", "moe-combine")
def test_the_layer_is_that_of_mixtral():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    theirs = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=D, intermediate_size=D_FF, num_local_experts=E, num_experts_per_tok=2)
    )
    ours = layer()
    value, gate = np.split(ours.w_in.data, 2, axis=1)
    with torch.no_grad():
        theirs.gate.weight.copy_(torch.tensor(ours.w_router.data))
        theirs.experts.gate_up_proj.copy_(torch.tensor(np.concatenate([gate, value], 1)))
        theirs.experts.down_proj.copy_(torch.tensor(ours.w_down.data))
    x = tokens(2, 7)
    given = torch.tensor(x.data, requires_grad=True)
    expected = theirs(given)
    cotangent = tokens(2, 7, seed=9).data
    expected.backward(torch.tensor(cotangent))
    mine = Tensor(x.data, requires_grad=True)
    y = ours(mine)
    found = grad(y, [mine, ours.w_router, ours.w_in, ours.w_down], cotangent)
    gate_up = theirs.experts.gate_up_proj.grad.numpy()
    d_in = np.concatenate(np.split(gate_up, 2, axis=1)[::-1], axis=1)
    wanted = [given.grad.numpy(), theirs.gate.weight.grad.numpy(), d_in, theirs.experts.down_proj.grad.numpy()]
    np.testing.assert_allclose(y.data, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.data, b, rtol=1e-4, atol=2e-6)
