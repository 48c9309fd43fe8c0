"""The threaded training step: shares add up to the whole, and threads do not disturb one another."""

import numpy as np
import pytest

from minillm.autograd import Tensor, grad
from minillm.fused.losses import cross_entropy
from minillm.models import Config, Decoder
from minillm.optim import AdamW
from minillm.training.step import BatchThreads, loss_and_gradients, split_batch

CONFIG = Config(vocab_size=13, d_model=16, n_layers=2, n_heads=2, d_ff=24, context=12)


def make(seed: int = 0):
    rng = np.random.default_rng(seed)
    model = Decoder(CONFIG, rng)
    ids = rng.integers(13, size=(6, 13))
    targets = ids[:, 1:].copy()
    targets[0, :5] = -100  # shares with different numbers of kept targets
    kept = int((targets != -100).sum())

    def loss_of_share(inputs, targets):
        return cross_entropy(model(inputs), targets, divisor=kept)

    return model, loss_of_share, ids[:, :-1], targets


@pytest.mark.equation("training-step", "grad-accumulation")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_shares_of_loss_and_gradient_add_up_to_the_whole_batch(threads):
    model, loss_of_share, inputs, targets = make()
    parameters = model.parameters()
    loss, whole = loss_and_gradients(loss_of_share(inputs, targets), parameters)
    with BatchThreads(threads).running() as workers:
        shared_loss, shares = workers.gradients(loss_of_share, parameters, inputs, targets)
    assert len(shares) == threads
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    for i, gradient in enumerate(whole):
        total = np.sum([share[i] for share in shares], axis=0)
        np.testing.assert_allclose(total, gradient, rtol=2e-4, atol=2e-6)


@pytest.mark.equation("thread-local-isolation", "scratch-buffer")
def test_threads_give_bit_for_bit_what_one_thread_gives_share_by_share():
    model, loss_of_share, inputs, targets = make()
    parameters = model.parameters()
    for _ in range(20):
        with BatchThreads(2).running() as workers:
            _, shares = workers.gradients(loss_of_share, parameters, inputs, targets)
            serial = [
                loss_and_gradients(loss_of_share(*share), parameters)[1] for share in split_batch([inputs, targets], 2)
            ]
        for together, alone in zip(shares, serial, strict=True):
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.equation("training-step")
def test_two_runs_of_the_threaded_step_are_bit_identical_and_learn():
    def run() -> tuple[list[float], np.ndarray]:
        model, loss_of_share, inputs, targets = make()
        parameters = model.parameters()
        optimiser, losses = AdamW(parameters, lr=3e-3), []
        with BatchThreads(2).running() as workers:
            for _ in range(30):
                loss, gradients = workers.gradients(loss_of_share, parameters, inputs, targets)
                optimiser.step(gradients, max_norm=1.0)
                losses.append(loss)
        return losses, np.concatenate([p.data.ravel() for p in parameters])

    (losses, weights), (again, same) = run(), run()
    assert losses == again
    np.testing.assert_array_equal(weights, same)
    assert losses[-1] < 0.7 * losses[0]


def test_a_parameter_outside_the_loss_gets_zeros():
    used, unused = (Tensor(np.ones(3), requires_grad=True) for _ in range(2))
    _, gradients = loss_and_gradients((used * 2.0).sum(), [used, unused])
    np.testing.assert_array_equal(gradients[0], [2, 2, 2])
    np.testing.assert_array_equal(gradients[1], [0, 0, 0])


def test_an_error_in_a_thread_reaches_the_caller():
    model, _, inputs, targets = make()

    def broken(inputs, targets):
        raise ValueError("no such loss")

    with BatchThreads(2).running() as workers, pytest.raises(ValueError, match="no such loss"):
        workers.gradients(broken, model.parameters(), inputs, targets)


@pytest.mark.parametrize("threads", [0, -1, 1.5])
def test_a_silly_number_of_threads_is_refused(threads):
    with pytest.raises(ValueError, match="threads must be a positive integer"):
        BatchThreads(threads)


def test_fewer_sequences_than_threads_is_fine():
    pieces = split_batch([np.arange(2)], 5)
    assert [list(p[0]) for p in pieces] == [[0], [1]]


def test_the_gradient_does_not_depend_on_arrays_being_reused():
    """Gradients held by the caller stay what they are while further steps reuse the scratch memory."""
    model, loss_of_share, inputs, targets = make()
    parameters = model.parameters()
    _, first = loss_and_gradients(loss_of_share(inputs, targets), parameters)
    copies = [g.copy() for g in first]
    for _ in range(3):
        grad(loss_of_share(inputs[::-1], targets[::-1]), parameters)
    for held, copy in zip(first, copies, strict=True):
        np.testing.assert_array_equal(held, copy)
