"""The supervised stage: what it minimises, what it learns, and its settings."""

import numpy as np
import pytest

from minillm.alignment import SFTConfig, new_sft, response_logprobs
from minillm.functional.supervised import sft_loss
from tests.alignment.conftest import SIZE


@pytest.mark.equation("sft-loss")
@pytest.mark.parametrize("threads", [1, 3])
def test_the_loss_of_an_update_is_the_sft_loss_of_its_demonstrations(task, threads):
    stage = new_sft(task, SFTConfig(batch=20, threads=threads), SIZE)
    twin = np.random.default_rng(0)
    twin.bit_generator.state = stage.rng.bit_generator.state
    batch = task.demonstrations(twin, 20, 0.6)
    logprobs = response_logprobs(stage.model, batch.prompts, batch.answers)
    expected = sft_loss(logprobs, np.ones(batch.answers.shape, bool)).item()
    with stage.threads.running():
        assert stage.update()["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.equation("sft-argmin")
def test_likelihood_training_reproduces_the_teacher_with_his_mistakes(clerk, skill):
    stage, history = clerk
    assert history[0]["loss"] > 2.0 and np.mean([m["loss"] for m in history[-20:]]) < 1.5
    found = skill(stage.model)
    assert found.sampled < found.greedy, "who imitates a careless teacher is careless"


def test_the_learning_rate_rises_and_falls(clerk):
    rates = [metrics["lr"] for metrics in clerk[1]]
    assert np.argmax(rates) == 9 and rates[9] == pytest.approx(1e-2)
    assert rates[0] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-3)


def test_a_run_shorter_than_its_warm_up_is_all_warm_up(task):
    history = new_sft(task, SFTConfig(updates=3, warmup=50, batch=4, evaluate_every=0, threads=1), SIZE).run()
    assert [m["lr"] for m in history[:2]] == pytest.approx([5e-3 / 3, 1e-2 / 3])


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("batch", 0, "SFTConfig: batch must be a positive integer, got 0"),
        ("updates", 1.5, "SFTConfig: updates must be a positive integer, got 1.5"),
        ("noise", 1.2, r"SFTConfig: noise must be a share in \[0, 1\], got 1.2"),
        ("lr", 0.0, "SFTConfig: lr must be a positive number, got 0.0"),
        ("lr_end", -1.0, r"SFTConfig: lr_end must be a share in \[0, 1\], got -1.0"),
        ("warmup", -1, "SFTConfig: warmup must be a non-negative integer, got -1"),
        ("max_norm", 0.0, "SFTConfig: max_norm must be a positive number"),
        ("threads", 0, "SFTConfig: threads must be a positive integer"),
        ("evaluate_every", -5, "SFTConfig: evaluate_every must be a non-negative integer"),
        ("evaluate_samples", 0, "SFTConfig: evaluate_samples must be a positive integer"),
        ("seed", -1, "SFTConfig: seed must be a non-negative integer"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        SFTConfig(**{setting: value})
