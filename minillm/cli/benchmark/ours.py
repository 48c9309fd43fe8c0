"""This engine's side of the benchmark: the code that `minillm train` runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from minillm.cli.benchmark.cases import BETAS, LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, Case
from minillm.fused.losses import cross_entropy
from minillm.models import Config, Decoder
from minillm.optim import AdamW
from minillm.training.step import BatchThreads


@contextmanager
def make_step(case: Case, threads: int) -> Iterator[Callable[[], float]]:
    """A training step on one fixed random batch."""
    rng = np.random.default_rng(0)
    config = Config(case.vocab_size, case.d_model, case.n_layers, case.n_heads, d_ff=case.d_ff, context=case.length)
    model = Decoder(config, rng)
    parameters = model.parameters()
    optimiser = AdamW(parameters, LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY)
    ids = rng.integers(case.vocab_size, size=(case.batch, case.length + 1))
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def loss_of_share(inputs, targets):
        return cross_entropy(model(inputs), targets, divisor=case.batch * case.length)

    with BatchThreads(threads).running() as workers:

        def step() -> float:
            loss, gradients = workers.gradients(loss_of_share, parameters, inputs, targets)
            optimiser.step(gradients, MAX_NORM)
            return loss

        yield step
