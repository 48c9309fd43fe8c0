r"""What the alignment stages share: a policy, an optimiser, a generator, a count of updates, and keeping all of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from minillm.alignment.policy import accuracy
from minillm.checks import message, require, require_positive
from minillm.data.tasks import AdditionTask
from minillm.models import Decoder
from minillm.optim import AdamW
from minillm.optim.schedules import schedule
from minillm.training.checkpoint import Checkpoint
from minillm.training.step import BatchThreads
from minillm.training.versions import versions, warn_of_differences

Metrics = dict[str, float]


@dataclass(frozen=True)
class StageConfig:
    """Settings of every stage; a stage adds its own."""

    updates: int
    lr: float
    lr_end: float = 0.1  # the last learning rate, as a share of the first
    warmup: int = 0  # updates; of a shorter run, all of them
    max_norm: float = 1.0  # of the gradient
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    evaluate_every: int = 50  # updates; 0: never
    evaluate_samples: int = 2  # sampled answers to each held-out problem
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        where = type(self).__name__
        for name in ("updates", "threads", "evaluate_samples"):
            require_positive(getattr(self, name), where, name, integer=True)
        for name in ("warmup", "evaluate_every", "seed"):
            require_positive(getattr(self, name), where, name, integer=True, zero_ok=True)
        for name in ("lr", "max_norm"):
            require_positive(getattr(self, name), where, name)
        require(0 <= self.lr_end <= 1, where, "lr_end", "a share in [0, 1]", self.lr_end)


class Stage:
    """A policy in training. A subclass says what one update is.

    The same configuration, policy and number of threads give the same run to the bit, also when it was interrupted,
    saved and restored in between.
    """

    name = "stage"

    def __init__(self, model: Decoder, task: AdditionTask, config: StageConfig):
        require(model.config.vocab_size == task.vocab_size, type(self).__name__, "the policy's vocabulary",
                f"the task's, {task.vocab_size}", model.config.vocab_size)  # fmt: skip
        self.model, self.task, self.config, self.done = model, task, config, 0
        self.optimizer = AdamW(
            model.parameters(), config.lr, (config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self.rng = np.random.default_rng([config.seed, *self.name.encode()])  # a stream of its own for every stage
        self.threads = BatchThreads(config.threads)
        self._lr = schedule(
            "cosine", config.lr, min(config.warmup, config.updates), config.updates, config.lr * config.lr_end
        )

    def update(self) -> Metrics:
        """Improve the policy once and say how it went."""
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    def run(self, on_metrics: Callable[[Metrics], None] | None = None) -> list[Metrics]:
        """Do all updates that are left; the metrics of each, which ``on_metrics`` gets as they come.

        The first entry of a new run holds the accuracy before any update, as step 0.
        """
        history = []
        for metrics in self.steps():
            history.append(metrics)
            if on_metrics is not None:
                on_metrics(metrics)
        return history

    def steps(self) -> Iterator[Metrics]:
        """The updates that are left, one at a time."""
        with self.threads.running():
            if self.done == 0 and self.config.evaluate_every:
                yield {"step": 0} | self.evaluate()
            while self.done < self.config.updates:
                self.optimizer.lr = self._lr(self.done + 1)
                metrics = {"step": self.done + 1, "lr": self.optimizer.lr} | self.update()
                self.done += 1
                every = self.config.evaluate_every
                if every and (self.done % every == 0 or self.done == self.config.updates):
                    metrics |= self.evaluate()
                yield metrics

    def evaluate(self) -> Metrics:
        """Accuracy on all held-out problems, by a generator of its own: looking does not change the run."""
        rng = np.random.default_rng([self.config.seed, self.done])
        found = accuracy(self.model, self.task, self.task.held_out_problems, rng, self.config.evaluate_samples)
        return {"greedy": found.greedy, "sampled": found.sampled}

    # ---- keeping and going on

    @property
    def effective_config(self) -> dict[str, Any]:
        """All settings of the run as plain data: what is printed and saved."""
        return {
            "model": self.model.config.to_dict(),
            self.name: asdict(self.config),
            "task": {"digits": self.task.digits},
        }

    def checkpoint(self) -> Checkpoint:
        """Everything that a run needs to go on, to the bit."""
        tensors = {f"model.{name}": array.copy() for name, array in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": array.copy() for name, array in self.optimizer.state_dict().items()}
        return Checkpoint(tensors, {
            "stage": self.name,
            "step": self.done,
            "config": self.effective_config,
            "tokenizer": self.task.tokenizer.to_dict(),
            "generator": self.rng.bit_generator.state,
            "versions": versions(self.config.threads),
        })  # fmt: skip

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint of this stage was made.

        Raises: ValueError if it is of another stage, configuration, task or model; nothing is changed then.
        Warns if Python, NumPy or the number of threads have changed since: results may differ in the last bits.
        """
        record, where = checkpoint.record, f"{type(self).__name__}.restore"
        found = str(record.get("stage"))
        require(found == self.name, where, "the checkpoint", f"of the stage {self.name}", found)
        for part, ours in self.effective_config.items():
            _require_same(where, ours, record["config"].get(part) or {})
        self.optimizer.load_state_dict(checkpoint.part("optimizer"))
        self.model.load_state_dict(checkpoint.part("model"))
        self.rng.bit_generator.state = record["generator"]
        self.done = int(record["step"])
        warn_of_differences(record.get("versions", {}), versions(self.config.threads))


def _require_same(where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise unless two configurations agree in everything but threads, naming the first setting that differs."""
    for name in sorted((ours.keys() | theirs.keys()) - {"threads"}):
        if ours.get(name) != theirs.get(name):
            wanted = f"{theirs.get(name)!r} as in the checkpoint"
            hint = "A run goes on with its own settings; start a new one to change them."
            raise ValueError(message(where, name, wanted, repr(ours.get(name)), hint))
