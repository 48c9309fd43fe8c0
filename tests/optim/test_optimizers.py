"""Optimisers against torch, against each other, and against what their equations promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.autograd import Tensor
from minillm.fused.losses import cross_entropy
from minillm.models import Config, Decoder
from minillm.optim import SGD, AdaGrad, Adam, AdamW, Momentum, RMSProp, add_shares, clip_global_norm
from minillm.training.step import loss_and_gradients

SHAPES = [(4, 3), (5,), (2, 3, 2), (1,)]


def make_parameters(seed: int = 0, dtype=np.float64) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [Tensor(rng.normal(size=shape).astype(dtype), requires_grad=True) for shape in SHAPES]


def make_gradients(steps: int, seed: int = 1, dtype=np.float64) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=shape).astype(dtype) for shape in SHAPES] for _ in range(steps)]


def run(optimizer, gradients, **options) -> list[np.ndarray]:
    for g in gradients:
        optimizer.step([g], **options)
    return [p.data.copy() for p in optimizer.parameters]


def run_torch(make, gradients, max_norm=None, dtype=np.float64) -> list[np.ndarray]:
    torch = pytest.importorskip("torch")
    parameters = [torch.nn.Parameter(torch.from_numpy(p.data.copy())) for p in make_parameters(dtype=dtype)]
    optimizer = make(torch.optim, parameters)
    for step in gradients:
        for p, g in zip(parameters, step, strict=True):
            p.grad = torch.from_numpy(g.copy())
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
    return [p.detach().numpy() for p in parameters]


def decay_groups(parameters, weight_decay):
    """The exemption: tensors with fewer than two axes (gains, biases) are not decayed."""
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


AGAINST_TORCH = {
    "sgd": (lambda p: SGD(p, 0.1), lambda o, p: o.SGD(p, 0.1)),
    "heavy ball": (lambda p: Momentum(p, 0.1, 0.8), lambda o, p: o.SGD(p, 0.1, momentum=0.8)),
    "nesterov": (
        lambda p: Momentum(p, 0.1, 0.8, nesterov=True),
        lambda o, p: o.SGD(p, 0.1, momentum=0.8, nesterov=True),
    ),
    "adagrad": (lambda p: AdaGrad(p, 0.1), lambda o, p: o.Adagrad(p, 0.1)),
    "rmsprop": (lambda p: RMSProp(p, 0.01, 0.9), lambda o, p: o.RMSprop(p, 0.01, alpha=0.9)),
    "adam": (lambda p: Adam(p, 0.01), lambda o, p: o.Adam(p, 0.01)),
    "adam with l2": (lambda p: Adam(p, 0.01, l2=0.3), lambda o, p: o.Adam(p, 0.01, weight_decay=0.3)),
    "adamw": (
        lambda p: AdamW(p, 0.01, (0.9, 0.95), 1e-8, 0.3),
        lambda o, p: o.AdamW(decay_groups(p, 0.3), 0.01, (0.9, 0.95), 1e-8),
    ),
}


@pytest.mark.equation("gd-sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw", "wd-param-groups")
@pytest.mark.parametrize("name", AGAINST_TORCH)
def test_twenty_steps_equal_torch(name):
    ours, theirs = AGAINST_TORCH[name]
    gradients = make_gradients(20)
    for a, b in zip(run(ours(make_parameters()), gradients), run_torch(theirs, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.equation("grad-clip", "adamw")
@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e6])
def test_clipped_steps_equal_torch(max_norm):
    gradients = make_gradients(10)
    ours, theirs = AGAINST_TORCH["adamw"]
    for a, b in zip(
        run(ours(make_parameters()), gradients, max_norm=max_norm),
        run_torch(theirs, gradients, max_norm),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.equation("adamw")
def test_in_float32_it_stays_float32_and_near_torch():
    gradients = make_gradients(20, dtype=np.float32)
    ours, theirs = AGAINST_TORCH["adamw"]
    for a, b in zip(
        run(ours(make_parameters(dtype=np.float32)), gradients),
        run_torch(theirs, gradients, dtype=np.float32),
        strict=True,
    ):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.equation("adam", "adamw")
def test_the_flat_buffer_computes_the_textbook_equation():
    gradients = make_gradients(15)
    flat = run(AdamW(make_parameters(), 0.02, (0.8, 0.9), 1e-6, weight_decay=0.0), gradients)
    written = run(Adam(make_parameters(), 0.02, (0.8, 0.9), 1e-6), gradients)
    for a, b in zip(flat, written, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.equation("adamw", "adam")
def test_decoupled_decay_is_not_adam_with_an_l2_penalty():
    gradients = make_gradients(5)
    decoupled = run(AdamW(make_parameters(), 0.01, (0.9, 0.999), 1e-8, weight_decay=0.3), gradients)
    penalty = run(Adam(make_parameters(), 0.01, (0.9, 0.999), 1e-8, l2=0.3), gradients)
    assert np.abs(decoupled[0] - penalty[0]).max() > 1e-3
    # Without a gradient the penalty still takes full-size steps, decay only shrinks by 1 - lr * wd.
    zero = [np.zeros(shape) for shape in SHAPES]
    start = make_parameters()[0].data
    np.testing.assert_allclose(run(AdamW(make_parameters(), 0.01, weight_decay=0.3), [zero])[0], start * (1 - 0.003))
    np.testing.assert_allclose(
        run(Adam(make_parameters(), 0.01, l2=0.3), [zero])[0], start - 0.01 * np.sign(start), atol=1e-6
    )


@pytest.mark.equation("wd-param-groups")
def test_vectors_are_not_decayed():
    zero = [np.zeros(shape) for shape in SHAPES]
    before = [p.data for p in make_parameters()]
    after = run(AdamW(make_parameters(), 0.1, weight_decay=0.5), [zero])
    for shape, a, b in zip(SHAPES, before, after, strict=True):
        assert (a == b).all() == (len(shape) < 2)


@pytest.mark.equation("adam")
@pytest.mark.parametrize("make", [Adam, AdamW])
@given(st.floats(-8, 8))
@settings(max_examples=25)
def test_the_first_step_has_the_size_of_the_learning_rate(make, exponent):
    g = 10.0**exponent
    theta = Tensor(np.zeros((1,)), requires_grad=True)
    make([theta], 0.01).step([[np.array([g])]])
    np.testing.assert_allclose(theta.data, [-0.01 * g / (g + 1e-8)], rtol=1e-9)


@pytest.mark.equation("adam-beta2")
@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.999])
def test_a_spike_is_remembered_for_about_one_over_one_minus_beta2_steps(beta2):
    """One gradient of 100 among ones: until it is forgotten, steps stay small. Recovery to half a step."""
    theta = Tensor(np.zeros(1), requires_grad=True)
    optimizer = Adam([theta], 1.0, (0.0, beta2))
    recovered = None
    for t in range(60 * round(1 / (1 - beta2))):
        before = theta.data.copy()
        optimizer.step([[np.array([100.0 if t == 0 else 1.0])]])
        if t > 0 and before - theta.data > 0.5:
            recovered = t
            break
    # With bias correction n = 1 + (100^2 - 1) beta^t (1 - beta) / (1 - beta^{t+1}); half a step at n = 4.
    memory = 1 / (1 - beta2)
    tail = np.log((100**2 - 1) / 3 * (1 - beta2) + 1 * beta2)
    assert recovered is not None
    assert abs(recovered - memory * tail) < 0.1 * memory * tail + 2


@pytest.mark.equation("adam-beta2")
def test_the_mean_of_squares_is_an_average_over_its_memory():
    theta = Tensor(np.zeros(1), requires_grad=True)
    optimizer = RMSProp([theta], 0.0, beta2=0.95)
    for g in [1.0] + [0.0] * 19:  # 1 / (1 - beta2) = 20 steps in all
        optimizer.step([[np.array([g])]])
    np.testing.assert_allclose(optimizer.state["n"][0], 0.05 * 0.95**19)
    assert pytest.approx(np.exp(-1), rel=0.03) == 0.95**20


@pytest.mark.equation("grad-clip")
@given(st.integers(0, 10**6), st.floats(0.01, 100.0))
@settings(max_examples=30)
def test_clipping_keeps_the_direction_and_bounds_one_norm_over_all(seed, c):
    gradients = make_gradients(1, seed)[0]
    clipped, norm = clip_global_norm(gradients, c)
    flat, flat_clipped = (np.concatenate([g.ravel() for g in list_]) for list_ in (gradients, clipped))
    assert norm == pytest.approx(np.linalg.norm(flat))
    assert np.linalg.norm(flat_clipped) == pytest.approx(min(norm, c), rel=1e-4)
    np.testing.assert_allclose(flat_clipped * norm, flat * np.linalg.norm(flat_clipped), rtol=1e-6, atol=1e-12)


@pytest.mark.equation("grad-clip")
@pytest.mark.parametrize("make", [lambda p: AdamW(p, 0.1), lambda p: SGD(p, 0.1)], ids=["AdamW", "SGD"])
def test_step_returns_the_norm_before_clipping(make):
    gradients = make_gradients(1)
    norm = np.sqrt(sum((g**2).sum() for g in gradients[0]))
    assert make(make_parameters()).step(gradients, max_norm=0.5) == pytest.approx(norm)


@pytest.mark.parametrize("make", [AdamW, Adam, SGD, Momentum, AdaGrad, RMSProp])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(make, bad):
    optimizer = make(make_parameters(), lr=0.1)
    optimizer.step(make_gradients(1))
    before = [p.data.copy() for p in optimizer.parameters]
    state = {k: v.copy() for k, v in optimizer.state_dict().items()}
    gradients = make_gradients(1, 5)
    gradients[0][2][0, 1, 1] = bad
    with pytest.raises(FloatingPointError, match="norm must be finite"):
        optimizer.step(gradients, max_norm=1.0)
    for p, b in zip(optimizer.parameters, before, strict=True):
        np.testing.assert_array_equal(p.data, b)
    for key, value in optimizer.state_dict().items():
        np.testing.assert_array_equal(value, state[key])


@pytest.mark.equation("grad-accumulation")
@pytest.mark.parametrize("make", [lambda p: AdamW(p, 0.01), lambda p: Momentum(p, 0.01)], ids=["AdamW", "Momentum"])
def test_micro_batches_weighted_by_their_tokens_equal_the_big_batch(make):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, size=(6, 8))
    targets = np.where(rng.random((6, 8)) < 0.4, -100, np.roll(ids, -1, 1))  # unequal token counts per sequence
    kept = int((targets != -100).sum())

    def gradients_of(model, rows):
        model = model_of()
        loss = cross_entropy(model(ids[rows]), targets[rows], divisor=kept)
        return loss_and_gradients(loss, model.parameters())

    def model_of():
        return Decoder(Config(9, 8, 1, 2, context=8), np.random.default_rng(1))

    big, small = model_of(), model_of()
    loss, whole = gradients_of(big, slice(None))
    parts = [gradients_of(small, rows) for rows in (slice(0, 1), slice(1, 3), slice(3, 6))]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-6)
    for a, b in zip(add_shares([g for _, g in parts]), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-7)
    # The mean of the micro-batches' own token means is something else.
    means = [cross_entropy(small(ids[r]), targets[r]).item() for r in (slice(0, 1), slice(1, 3), slice(3, 6))]
    assert abs(np.mean(means) - loss) > 1e-3 * loss
    make(big.parameters()).step([whole])
    make(small.parameters()).step([g for _, g in parts])
    for a, b in zip(big.parameters(), small.parameters(), strict=True):
        np.testing.assert_allclose(a.data, b.data, atol=1e-4)


@pytest.mark.parametrize("make", [AdamW, Adam, Momentum, AdaGrad, RMSProp, SGD])
def test_a_restored_optimiser_goes_on_as_if_nothing_had_happened(make):
    gradients = make_gradients(6)
    whole = run(make(make_parameters(), lr=0.1), gradients)
    first = make(make_parameters(), lr=0.1)
    middle = run(first, gradients[:3])
    resumed = make([Tensor(a, requires_grad=True) for a in middle], lr=0.1)
    resumed.load_state_dict({k: v.copy() for k, v in first.state_dict().items()})
    for a, b in zip(run(resumed, gradients[3:]), whole, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [AdamW, Adam])
def test_foreign_state_is_refused_and_changes_nothing(make):
    optimizer = make(make_parameters(), lr=0.1)
    optimizer.step(make_gradients(1))
    state = {k: v.copy() for k, v in optimizer.state_dict().items()}
    with pytest.raises(ValueError, match="entries"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != "m.1"})
    with pytest.raises(ValueError, match=r"n.0 must be of shape \(4, 3\), got shape \(3, 4\)"):
        optimizer.load_state_dict({**{k: v * 0 for k, v in state.items()}, "n.0": state["n.0"].T})
    for key, value in optimizer.state_dict().items():
        np.testing.assert_array_equal(value, state[key])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: SGD([], 0.1), "at least one tensor"),
        (lambda p: SGD(p, -0.1), "lr must be a non-negative number"),
        (lambda p: Momentum(p, 0.1, mu=1.0), r"mu must be in \[0, 1\)"),
        (lambda p: RMSProp(p, 0.1, beta2=1.0), r"beta2 must be in \[0, 1\)"),
        (lambda p: Adam(p, 0.1, betas=(0.9, 1.0)), r"betas must be in \[0, 1\)"),
        (lambda p: AdaGrad(p, 0.1, eps=0.0), "eps must be a positive number"),
        (lambda p: AdamW(p, 0.1, weight_decay=-1.0), "weight_decay must be a non-negative number"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make(make_parameters())


@pytest.mark.equation("momentum")
def test_without_momentum_it_is_gradient_descent():
    gradients = make_gradients(4)
    for nesterov in (False, True):
        for a, b in zip(
            run(Momentum(make_parameters(), 0.1, 0.0, nesterov), gradients), run(SGD(make_parameters(), 0.1), gradients)
        ):
            np.testing.assert_array_equal(a, b)
