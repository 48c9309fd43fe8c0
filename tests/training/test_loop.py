"""The training loop: it learns, it says what it does, and a stopped run goes on as if it had never stopped."""

import json
import math
import re
import warnings

import numpy as np
import pytest

from minillm.data import IGNORE, Batch, BatchStream, ByteTokenizer, even_source
from minillm.decoding import generate
from minillm.models import Config, Decoder
from minillm.optim import AdamW
from minillm.training.checkpoint import Checkpoint, checkpoint_path, checkpoints_in, read_checkpoint, write_checkpoint
from minillm.training.config import TrainingConfig
from minillm.training.loop import HeldOut, Trainer
from minillm.training.metrics import MetricsLog
from minillm.training.restore import load_model

TOKENS = np.random.default_rng(0).integers(0, 9, size=400)


def make(folder=None, tokens=TOKENS, seed=0, width=8, on_look=None, stream=None, **changes) -> Trainer:
    settings = {
        "steps": 20,
        "batch_size": 4,
        "n_ctx": 8,
        "warmup_steps": 2,
        "checkpoint_every": 5,
        "validate_every": 10,
    }
    config = TrainingConfig(**{**settings, "seed": seed, **changes})
    model = Decoder(Config(9, width, 1, 2, d_ff=12, context=8), np.random.default_rng(seed))
    stream = stream or BatchStream(tokens, 8, config.batch_size, np.random.default_rng([seed, 1]))
    held_out = HeldOut(tokens[:60], 60)
    return Trainer(model, stream, config, folder=folder, held_out=held_out, on_look=on_look, show_progress=False)


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in trainer.model.state_dict().items()}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.equation("training-step")
def test_a_periodic_text_is_learnt():
    trainer = make(tokens=np.tile([1, 5, 2, 8, 3], 80), steps=120, lr=1e-2)
    assert trainer.run() < 0.1 < math.log(5)  # what is left is the first token of a window


@pytest.mark.equation("training-step", "lr-warmup", "lr-cosine", "grad-clip")
def test_the_loop_is_the_five_lines_it_claims_to_be():
    """The same run by hand: forward, loss, backward, clip, optimiser, schedule."""
    from minillm.functional.language_model import clm_loss
    from minillm.optim.schedules import cosine

    trainer = make(steps=6, max_norm=0.3, weight_decay=0.2)
    trainer.run()
    config, twin = trainer.config, make()
    model, stream = twin.model, twin.stream
    optimizer = AdamW(model.parameters(), config.lr, weight_decay=0.2)
    for step in range(1, 7):
        inputs, targets = stream.next_batch()
        model.zero_grad()
        # All windows but their last token are inputs and targets at once: the loss of the whole window.
        clm_loss(model(inputs), targets, bos=True).backward()
        optimizer.lr = cosine(step, config.lr, 2, 6, 0.1 * config.lr)
        optimizer.step(max_norm=0.3)
    for name, array in weights(trainer).items():
        np.testing.assert_allclose(array, model.state_dict()[name], atol=2e-6)


@pytest.mark.equation("grad-accumulation")
def test_accumulated_batches_equal_one_large_batch_even_with_unequal_targets():
    class Fixed:
        """Twelve sequences, with more and more ignored targets, in batches of a size."""

        def __init__(self, size: int):
            ids = np.random.default_rng(3).integers(0, 9, size=(12, 9))
            targets = np.where(np.arange(8) < np.arange(12)[:, None] * 0.6, IGNORE, ids[:, 1:])
            self.batches = [Batch(ids[i : i + size, :-1], targets[i : i + size]) for i in range(0, 12, size)]
            self.drawn = 0

        def next_batch(self) -> Batch:
            self.drawn += 1
            return self.batches[(self.drawn - 1) % len(self.batches)]

        def state_dict(self):
            return {"drawn": self.drawn}

        def load_state_dict(self, state):
            self.drawn = state["drawn"]

    one = make(stream=Fixed(12), steps=5)
    many = make(stream=Fixed(3), steps=5, accumulate=4)
    for _ in range(5):
        assert one.train_step() == pytest.approx(many.train_step(), rel=1e-5)
    for name, array in weights(one).items():
        np.testing.assert_allclose(array, weights(many)[name], atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, threads, accumulate):
    options = {"threads": threads, "accumulate": accumulate}
    whole = make(tmp_path / "whole", **options)
    whole.run()
    stopped = make(tmp_path / "stopped", **options)
    with stopped.threads.running():
        for _ in range(13):  # three steps past the checkpoint of step 10
            stopped.train_step()
            if stopped.step % 5 == 0:
                stopped.save()
    resumed = make(tmp_path / "stopped", **options)
    resumed.resume(checkpoint_path(tmp_path / "stopped", 10))
    assert resumed.step == 10
    resumed.run()
    assert_same(weights(whole), weights(resumed))
    assert_same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    losses = [[line["loss"] for line in t.metrics.read() if "loss" in line] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_another_seed_is_another_run():
    assert any((a != b).any() for a, b in zip(weights(make(seed=0)).values(), weights(make(seed=1)).values()))
    first, second = make(), make()
    first.run(), second.run()
    assert_same(weights(first), weights(second))


def test_looking_does_not_change_the_run():
    """Validation and samples use no random numbers of the run and leave no trace in it."""
    looks = []

    def look(trainer: Trainer) -> None:
        looks.append(trainer.step)
        generate(trainer.model, TOKENS[None, :4], 3, np.random.default_rng(0))

    looking, blind = make(validate_every=3, on_look=look), make(validate_every=0)
    looking.run(), blind.run()
    assert looks == [0, 3, 6, 9, 12, 15, 18, 20]
    assert_same(weights(looking), weights(blind))


def test_metrics_are_one_json_object_a_line_and_steps_appear_once(tmp_path):
    trainer = make(tmp_path, log_every=2, on_look=lambda t: t.metrics.append(step=t.step, sample="é\n"))
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(2, 21, 2))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 10, 20]
    assert [line["sample"] for line in lines if "sample" in line] == ["é\n"] * 3
    last = [line for line in lines if "loss" in line][-1]
    assert last["tokens"] == 20 * 4 * 8 and last["lr"] == pytest.approx(2e-4) and last["grad_norm"] > 0
    checked = [line for line in lines if "bits_per_byte" in line][-1]
    bits = (checked["validation_loss"] * 59 + math.log(9)) / math.log(2) / 60
    assert checked["bits_per_byte"] == pytest.approx(bits)


def test_metrics_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(5):
        log.append(step=step, loss=float("nan") if step == 1 else np.float32(0.5))
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    assert [line["loss"] for line in log.read()] == [0.5, None, 0.5, 0.5, 0.5]
    log.rewind(2)
    log.append(step=3, loss=1.0)
    assert [line["step"] for line in log.read()] == [0, 1, 2, 3]
    assert log.path.read_text(encoding="utf-8").count("\n") == 4


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().run()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_the_last_checkpoints_and_the_final_one_is_a_model(tmp_path):
    trainer = make(tmp_path, keep_checkpoints=3)
    trainer.tokenizer = ByteTokenizer()
    trainer.run()
    assert checkpoints_in(tmp_path) == [checkpoint_path(tmp_path, step) for step in (10, 15, 20)]
    restored = load_model(tmp_path)
    assert_same(restored.model.state_dict(), weights(trainer))
    assert restored.tokenizer == ByteTokenizer()
    assert restored.checkpoint.record["config"] == trainer.effective_config
    assert {"python", "numpy", "threads", "blas"} == restored.checkpoint.record["versions"].keys()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_the_run_in_one_sentence_and_keeps_the_last_good_checkpoint(tmp_path, where, monkeypatch):
    trainer = make(tmp_path)

    def poison(loss, shares):
        if trainer.step == 12:
            loss = math.nan if where == "loss" else loss
            shares[0][0][...] = np.nan
        return loss, shares

    original = trainer.threads.gradients
    monkeypatch.setattr(trainer.threads, "gradients", lambda *arguments: poison(*original(*arguments)))
    before = {}
    with pytest.raises(FloatingPointError) as caught:
        while trainer.step < 20:
            before = weights(trainer)
            trainer.train_step()
            if trainer.step % 5 == 0:
                trainer.save()
    assert re.search(rf"the {where} must be finite, got .*NaN.* at step 13", str(caught.value), re.IGNORECASE)
    assert str(checkpoint_path(tmp_path, 10)) in str(caught.value) and "\n" not in str(caught.value)
    assert_same(weights(trainer), before)
    assert trainer.step == 12 and read_checkpoint(checkpoint_path(tmp_path, 10)).record["step"] == 10


def test_a_learning_rate_that_explodes_is_caught_by_the_same_check(tmp_path):
    trainer = make(tmp_path, lr=1e20, warmup_steps=0, weight_decay=0.0)
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="The last good checkpoint is"):
        trainer.run()


CHANGED = {
    "another width": (
        {"width": 16},
        "the model configuration must be that of the checkpoint: d_model = 8, got d_model = 16",
    ),
    "another rate": (
        {"lr": 1.0},
        "the training configuration must be that of the checkpoint: lr = 0.002, got lr = 1.0",
    ),
    "other data": ({"tokens": TOKENS[::-1].copy()}, "Resume with the data and the sizes of the first run"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_resuming_another_run_is_refused(tmp_path, kind):
    changes, words = CHANGED[kind]
    make(tmp_path, steps=5).run()
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **{"steps": 5, **changes}).resume(checkpoint_path(tmp_path, 5))


def test_a_change_of_versions_or_threads_is_warned_of(tmp_path):
    make(tmp_path, steps=5).run()
    path = checkpoint_path(tmp_path, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, steps=5).resume(path)
    with pytest.warns(UserWarning, match=r"threads 1 -> 2; the run goes on, but not to the bit"):
        make(tmp_path, steps=5, threads=2).resume(path)
    saved = read_checkpoint(path)
    write_checkpoint(path, Checkpoint(saved.tensors, {**saved.record, "versions": {"numpy": "1.0"}}))
    with pytest.warns(UserWarning, match="numpy 1.0 ->"):
        make(tmp_path, steps=5).resume(path)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(IndexError, match=r"9"):
        make(tokens=np.arange(400) % 10).run()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_ctx": 9}, "n_ctx must be at most 8, the model's context, got 9"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"warmup_steps": 21}, "warmup_steps must be at most steps = 20"),
        ({"schedule": "zigzag"}, "schedule must be one of"),
        ({"threads": 0}, "threads must be a positive integer"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_on_a_source_with_one_bit_of_memory_it_comes_near_the_entropy_rate():
    """Ones in runs of even length: a short run gets within 5 % of what the source itself would need."""
    source = even_source()
    tokens = source.sample(np.random.default_rng(0), 12_000)
    model = Decoder(Config(2, 16, 1, 2, context=16, init_std=0.1), np.random.default_rng(0))
    stream = BatchStream(tokens[:10_000], 16, 32, np.random.default_rng(1))
    config = TrainingConfig(steps=150, batch_size=32, n_ctx=16, lr=1e-2, warmup_steps=10)
    loss = Trainer(model, stream, config, held_out=HeldOut(tokens[10_000:]), show_progress=False).run()
    assert source.entropy_rate() * 0.98 < loss < math.log(2) * 0.95
