"""What all stages share: the same run again, a run interrupted and resumed, and looking without touching."""

import numpy as np
import pytest

from minillm.alignment import GRPO, SFT, GRPOConfig, PolicySize, SFTConfig, fresh_policy, frozen_copy
from minillm.alignment.stage import Stage
from minillm.data.tasks import AdditionTask
from minillm.models import Config, Decoder
from minillm.training.checkpoint import read_checkpoint, write_checkpoint
from minillm.training.restore import load_model
from tests.alignment.conftest import SIZE

COMMON = {"updates": 4, "evaluate_every": 2}
GRPO_SETTINGS = {
    "plain": {},
    "everything": {
        "beta": 0.05,
        "minibatches": 2,
        "epochs": 1,
        "dynamic_sampling": True,
        "advantage": "rloo",
        "temperature": 0.9,
    },
}


def new_stage(kind: str, policy, task, **settings) -> Stage:
    model = frozen_copy(policy)
    if kind == "sft":
        return SFT(model, task, SFTConfig(**{**COMMON, "batch": 16, "warmup": 2, **settings}))
    config = {**COMMON, "prompts": 4, "group": 4, "lr": 1e-3, **GRPO_SETTINGS[kind], **settings}
    return GRPO(model, task, GRPOConfig(**config))


def state_of(stage: Stage) -> dict:
    return stage.checkpoint().tensors


KINDS = pytest.mark.parametrize("kind", ["sft", "plain", "everything"])


@KINDS
def test_the_same_run_twice_is_the_same_to_the_bit(kind, policy, task):
    first, second = (new_stage(kind, policy, task, threads=2) for _ in range(2))
    assert first.run() == second.run()
    for name, array in state_of(first).items():
        np.testing.assert_array_equal(array, state_of(second)[name], err_msg=name)


def test_another_seed_is_another_run(policy, task):
    first, second = (next(new_stage("sft", policy, task, seed=seed, evaluate_every=0).steps()) for seed in (0, 1))
    assert first["loss"] != second["loss"]


@KINDS
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_is_interrupted_saved_and_resumed_is_the_same_to_the_bit(kind, policy, task, stop, tmp_path):
    whole = new_stage(kind, policy, task)
    history = whole.run()
    stopped = new_stage(kind, policy, task)
    seen = []
    for metrics in stopped.steps():
        seen.append(metrics)
        if stopped.done == stop:
            break
    write_checkpoint(tmp_path / "stopped.safetensors", stopped.checkpoint())
    resumed = new_stage(kind, fresh_policy(task, SIZE, np.random.default_rng(7)), task)
    resumed.restore(read_checkpoint(tmp_path / "stopped.safetensors"))
    assert seen + resumed.run() == history
    for name, array in state_of(whole).items():
        np.testing.assert_array_equal(array, state_of(resumed)[name], err_msg=name)


def test_looking_does_not_change_the_run(policy, task):
    often, never = (new_stage("plain", policy, task, evaluate_every=every) for every in (1, 0))
    looks = [metrics for metrics in often.run() if "greedy" in metrics]
    assert [metrics["step"] for metrics in looks] == list(range(5))
    assert all("greedy" not in metrics for metrics in never.run())
    for name, array in state_of(often).items():
        np.testing.assert_array_equal(array, state_of(never)[name], err_msg=name)


def test_it_looks_before_the_first_update_at_the_interval_and_after_the_last(policy, task):
    stage = new_stage("plain", policy, task)
    heard = []
    history = stage.run(heard.append)
    assert heard == history
    assert [m["step"] for m in history] == [0, 1, 2, 3, 4]
    assert [m["step"] for m in history if "sampled" in m] == [0, 2, 4]
    assert stage.run() == [], "a finished run has nothing left to do"


def test_a_checkpoint_of_a_stage_is_a_model_that_can_be_loaded(policy, task, tmp_path):
    stage = new_stage("plain", policy, task)
    stage.run()
    write_checkpoint(tmp_path / "checkpoint-00000004.safetensors", stage.checkpoint())
    restored = load_model(tmp_path)
    assert restored.tokenizer == task.tokenizer
    for name, array in restored.model.state_dict().items():
        np.testing.assert_array_equal(array, stage.model.state_dict()[name])


def test_a_checkpoint_does_not_change_with_the_run(policy, task):
    stage = new_stage("plain", policy, task)
    saved = stage.checkpoint().tensors["model.head.weight"]
    before = saved.copy()
    stage.run()
    np.testing.assert_array_equal(saved, before)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lr": 2e-3}, r"GRPO.restore: lr must be 0.001 as in the checkpoint, got 0.002. A run goes on with its own"),
        ({"seed": 3}, "GRPO.restore: seed must be 0 as in the checkpoint, got 3"),
        ({"group": 8}, "GRPO.restore: group must be 4 as in the checkpoint, got 8"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(policy, task, settings, complaint):
    saved = new_stage("plain", policy, task).checkpoint()
    other = new_stage("plain", policy, task, **settings)
    before = {name: array.copy() for name, array in state_of(other).items()}
    with pytest.raises(ValueError, match=complaint):
        other.restore(saved)
    for name, array in state_of(other).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_stage_resumes_only_from_its_own_kind_and_model(policy, task):
    with pytest.raises(ValueError, match=r"SFT.restore: the checkpoint must be of the stage sft, got grpo"):
        new_stage("sft", policy, task).restore(new_stage("plain", policy, task).checkpoint())
    larger = fresh_policy(task, PolicySize(16, 1, 2, 32), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"GRPO.restore: d_ff must be 64 as in the checkpoint, got 32"):
        new_stage("plain", larger, task).restore(new_stage("plain", policy, task).checkpoint())


def test_another_number_of_threads_goes_on_with_a_warning(policy, task):
    saved = new_stage("plain", policy, task, threads=1).checkpoint()
    stage = new_stage("plain", policy, task, threads=2)
    with pytest.warns(UserWarning, match="threads 1 -> 2"):
        stage.restore(saved)


def test_a_policy_of_another_vocabulary_is_refused(task):
    stranger = Decoder(Config(vocab_size=13, d_model=16, n_layers=1, n_heads=2), np.random.default_rng(0))
    with pytest.raises(ValueError, match="GRPO: the policy's vocabulary must be the task's, 15, got 13"):
        GRPO(stranger, task, GRPOConfig())


@pytest.mark.slow
@pytest.mark.equation("grpo-loss")
def test_three_seeds_learn_to_add_from_the_reward_alone():
    """Sampled accuracy on held-out sums of two digits: at least 0.95 on average and never under 0.93."""
    task, before, after = AdditionTask(digits=2), [], []
    for seed in range(3):
        model = fresh_policy(task, PolicySize(), np.random.default_rng(seed))
        sft = SFT(model, task, SFTConfig(seed=seed, evaluate_every=0))
        sft.run()
        before.append(sft.evaluate())
        grpo = GRPO(sft.model, task, GRPOConfig(seed=seed, evaluate_every=0, evaluate_samples=10))
        grpo.run()
        after.append(grpo.evaluate())
    assert all(look["greedy"] > 0.98 and look["sampled"] < 0.6 for look in before), before
    sampled = [look["sampled"] for look in after]
    assert np.mean(sampled) >= 0.95 and min(sampled) >= 0.93, after
    assert min(look["greedy"] for look in after) >= 0.98, after
