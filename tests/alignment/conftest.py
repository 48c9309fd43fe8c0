"""A policy that adds two digits and samples badly, trained once: what the tests of rollouts and GRPO start from."""

import numpy as np
import pytest

from minillm.alignment import PolicySize, SFTConfig, accuracy, fresh_policy, frozen_copy, new_sft
from minillm.data.tasks import AdditionTask

SIZE = PolicySize(d_model=32, n_layers=2, n_heads=4, d_ff=64)


@pytest.fixture(scope="session")
def task():
    return AdditionTask(digits=1)


@pytest.fixture(scope="session")
def clerk(task):
    """The stage that trained the policy, and its metrics."""
    config = SFTConfig(updates=260, batch=64, lr=1e-2, warmup=10, evaluate_every=0, threads=1)
    stage = new_sft(task, config, SIZE)
    return stage, stage.run()


@pytest.fixture
def policy(clerk):
    """A copy that a test may train."""
    return frozen_copy(clerk[0].model)


@pytest.fixture
def untrained(task):
    return fresh_policy(task, SIZE, np.random.default_rng(0))


@pytest.fixture
def skill(task):
    """How often a policy is right on the problems that the small task trains on: it has only ten others."""
    return lambda model: accuracy(model, task, task.train_problems, np.random.default_rng(0), samples=10)
