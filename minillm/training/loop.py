r"""The training loop: batches, steps, a look at held-out text, checkpoints.

Equation: `training-step` forward, loss, backward, clip, optimiser, schedule, again and again
Source: topics #8.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from minillm.autograd import Tensor
from minillm.checks import require
from minillm.data import IGNORE, Batch, Tokenizer
from minillm.functional.balance import moe_total_loss
from minillm.fused.losses import cross_entropy
from minillm.models import Config
from minillm.models.making import AnyModel
from minillm.nn.experts import Routing
from minillm.optim import AdamW
from minillm.training.checkpoint import Checkpoint, checkpoint_path, keep_newest, read_checkpoint, write_checkpoint
from minillm.training.config import TrainingConfig
from minillm.training.evaluate import Evaluation, evaluate
from minillm.training.experts import expert_layers, mean_aux_loss, update_biases
from minillm.training.metrics import MetricsLog
from minillm.training.objectives import draws_in_training, objective_for
from minillm.training.step import BatchThreads
from minillm.training.versions import versions, warn_of_differences


@runtime_checkable
class Stream(Protocol):
    """Where batches come from: `minillm.data.BatchStream`, or anything that can say where it stands."""

    def next_batch(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class HeldOut(NamedTuple):
    """Text to validate on, and how many bytes it stands for where that is known."""

    tokens: np.ndarray
    n_bytes: int | None = None


class Trainer:
    r"""A model, its optimiser and its data, and the loop over them.

    Equation: `training-step` forward → loss → backward → clip → optimiser → schedule
    Equation: `grad-accumulation` a step's batches are weighted by their token counts
    Equation: `moe-total-loss` with experts, the load-balancing loss is added, and biases of sigmoid routers move
    Raises: ValueError if the sequences are longer than the model's context.
    Source: topics #8; deepseek (common algorithm).

    With a ``folder`` the run writes metrics and checkpoints there; `resume` goes on from one as if the run had never
    stopped, to the bit, on the same machine, thread count and library versions. ``on_look`` is called with the
    trainer before the first step, at every validation and at the end: what samples are made of, handed in from above.

    What computes is in `update` and `evaluate`, so that another engine can take their place.
    """

    leads = True  # of several processes that train together, the one that prints and writes

    def __init__(
        self,
        model: AnyModel,
        stream: Stream,
        config: TrainingConfig,
        *,
        folder: str | os.PathLike | None = None,
        held_out: HeldOut | None = None,
        tokenizer: Tokenizer | None = None,
        extra_config: dict[str, Any] | None = None,
        on_look: Callable[["Trainer"], None] | None = None,
        show_progress: bool = True,
    ):
        context = model.config.context
        require(config.n_ctx <= context, "Trainer", "n_ctx", f"at most {context}, the model's context", config.n_ctx)
        self.model, self.stream, self.config = model, stream, config
        self.objective = objective_for(model.config, config.n_ctx)
        self.rng = np.random.default_rng([config.seed, 4])  # of the objective and of what a pass draws
        self.experts = expert_layers(model)
        self.draws = draws_in_training(model.config)
        self.folder = None if folder is None else Path(folder)
        self.held_out, self.tokenizer, self.on_look = held_out, tokenizer, on_look
        self.extra_config = extra_config or {}
        self.optimizer = AdamW(
            model.parameters(), config.lr, (config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self.metrics = MetricsLog(None if self.folder is None else self.folder / "metrics.jsonl")
        self.threads = BatchThreads(config.threads)
        self.step, self.seconds, self.validation_loss = 0, 0.0, math.nan
        self._show_progress, self._saved_step = show_progress, -1

    @property
    def effective_config(self) -> dict[str, Any]:
        """All settings of the run as plain data: what is printed and saved."""
        return {"model": self.model.config.to_dict(), "training": self.config.to_dict(), **self.extra_config}

    def run(self) -> float:
        """Train until the configured number of steps and return the last validation loss, in nats per token."""
        with (
            self.threads.running(),
            tqdm(
                total=self.config.steps,
                initial=self.step,
                desc="train",
                unit="step",
                file=sys.stderr,
                disable=not self._show_progress,
            ) as bar,
        ):
            if self.step == 0:
                self.look()
                self.save()
            while self.step < self.config.steps:
                loss = self.train_step()
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", validation=f"{self.validation_loss:.3f}", refresh=False)
                if self._is_due(self.config.validate_every):
                    self.look()
                if self._is_due(self.config.checkpoint_every):
                    self.save()
        return self.validation_loss

    def train_step(self) -> float:
        r"""One step on the next batches; returns their loss in nats per token.

        Equation: `training-step` forward → loss → backward → clip → optimiser → schedule
        Source: topics #8.
        Raises: FloatingPointError if loss or gradient is not finite; parameters and checkpoints stay as they were.
        """
        start = time.perf_counter()
        loss, norm = self.update()
        self.step += 1
        self.seconds += time.perf_counter() - start
        if self._is_due(self.config.log_every):
            self.metrics.append(
                step=self.step,
                loss=loss,
                lr=self.optimizer.lr,
                grad_norm=norm,
                tokens=self.step * self.config.tokens_per_step,
                seconds=round(self.seconds, 3),
            )
        return loss

    def update(self) -> tuple[float, float]:
        """Move the parameters by the next batches; returns their loss and the length of the gradient."""
        questions = [self.objective.ask(self.stream.next_batch(), self.rng) for _ in range(self.config.accumulate)]
        n_targets = max(1, sum(int((q.targets != IGNORE).sum()) for q in questions))
        n_rows = sum(len(q.targets) for q in questions)
        loads: list[list[np.ndarray]] = []

        def loss_of_share(targets: np.ndarray, seeds: np.ndarray, *reads: np.ndarray) -> Tensor:
            options: dict[str, Any] = {"rng": np.random.default_rng(seeds)} if self.draws else {}
            record: list[Routing] = []
            options |= {"record": record} if self.experts else {}
            loss = cross_entropy(self.objective.answer(self.model, *reads, **options), targets, divisor=n_targets)
            if not record:
                return loss
            loads.append([routing.loads for routing in record])
            share = len(targets) / n_rows
            return moe_total_loss(loss, mean_aux_loss(record), self.config.aux_coefficient * share)

        loss, shares = 0.0, []
        for reads, targets in questions:
            seeds = self.rng.integers(2**32, size=len(targets)) if self.draws else np.zeros(len(targets), np.int64)
            part, gradients = self.threads.gradients(loss_of_share, self.optimizer.parameters, targets, seeds, *reads)
            loss, shares = loss + part, shares + gradients
        if not math.isfinite(loss):
            raise FloatingPointError(self._divergence(f"the loss must be finite, got {loss}"))
        self.optimizer.lr = self.config.learning_rate(self.step + 1)
        try:
            norm = self.optimizer.step(shares, max_norm=self.config.max_norm)
        except FloatingPointError as error:
            raise FloatingPointError(self._divergence("the gradient must be finite, got NaN or infinity")) from error
        update_biases(self.experts, loads, self.config.bias_rate)
        return loss, norm

    def evaluate(self, tokens: np.ndarray, stride: int | None = None) -> Evaluation:
        """How well the model predicts a text now."""
        return evaluate(self.model, tokens, n_ctx=self.config.n_ctx, stride=stride, threads=self.threads)

    def look(self) -> None:
        """Validate, if there is held-out text, and let the caller look at the model."""
        if self.held_out is not None:
            result = self.evaluate(self.held_out.tokens)
            self.validation_loss = result.mean_nll
            line = {"step": self.step, "validation_loss": result.mean_nll}
            if self.held_out.n_bytes is not None and self.model.config.architecture == "decoder":
                line["bits_per_byte"] = result.bits_per_byte(self.held_out.n_bytes, self.model.config.vocab_size)
            self.metrics.append(**line)
        if self.on_look is not None:
            self.on_look(self)

    def save(self) -> None:
        """Write a checkpoint of this step and remove old ones."""
        if self.folder is None or self._saved_step == self.step:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint_path(self.folder, self.step), self.checkpoint())
        self._saved_step = self.step
        keep_newest(self.folder, self.config.keep_checkpoints)

    def checkpoint(self) -> Checkpoint:
        """Everything that the run needs to go on."""
        tensors = {f"model.{name}": array for name, array in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": array for name, array in self.optimizer.state_dict().items()}
        record = {
            "step": self.step,
            "seconds": self.seconds,
            "validation_loss": None if math.isnan(self.validation_loss) else self.validation_loss,
            "config": self.effective_config,
            "data": self.stream.state_dict(),
            "rng": self.rng.bit_generator.state,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.to_dict(),
            "versions": self.versions(),
        }
        return Checkpoint(tensors, record)

    def versions(self) -> dict[str, Any]:
        """What the last bits of the run depend on."""
        return versions(self.config.threads)

    def resume(self, path: str | os.PathLike) -> None:
        """Go back to where a checkpoint was written.

        Raises: FileNotFoundError, or ValueError if the file is damaged or of another model, configuration or data.
        Warns if Python, NumPy or the number of threads have changed since: results may differ in the last bits.
        """
        saved = read_checkpoint(path)
        for what, complete in (("model", Config.from_dict), ("training", lambda values: TrainingConfig(**values))):
            before = _completed(saved.record.get("config", {}).get(what), complete)
            _require_same(before, self.effective_config[what], what, path)
        self.model.load_state_dict(saved.part("model"))
        self.optimizer.load_state_dict(saved.part("optimizer"))
        self.stream.load_state_dict(saved.record["data"])
        if "rng" in saved.record:  # older checkpoints are of decoders, which draw nothing
            self.rng.bit_generator.state = saved.record["rng"]
        self.step, self.seconds = saved.record["step"], saved.record["seconds"]
        loss = saved.record.get("validation_loss")
        self.validation_loss = math.nan if loss is None else loss
        self._saved_step = self.step
        self.metrics.rewind(self.step)
        warn_of_differences(saved.record.get("versions", {}), self.versions())

    def _is_due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _divergence(self, what: str) -> str:
        kept = (
            f"The last good checkpoint is {checkpoint_path(self.folder, self._saved_step)}."
            if self.folder is not None and self._saved_step >= 0
            else "No checkpoint was written."
        )
        return f"train: {what} at step {self.step + 1}. {kept} Lower the learning rate or look at the data."


def _completed(saved: Any, complete: Callable[[dict[str, Any]], Any]) -> Any:
    """A saved configuration with the defaults of settings that came later; one that cannot be read stays as it is."""
    try:
        return complete(saved).to_dict()
    except (TypeError, ValueError, AttributeError):
        return saved


def _require_same(saved: Any, wanted: dict[str, Any], what: str, path: str | os.PathLike) -> None:
    saved = saved if isinstance(saved, dict) else {}
    names = sorted(name for name in saved.keys() | wanted.keys() if name != "threads")
    differing = [n for n in names if saved.get(n) != wanted.get(n)]
    received = ", ".join(f"{n} = {wanted.get(n)}" for n in differing[:4])
    expected = "that of the checkpoint: " + ", ".join(f"{n} = {saved.get(n)}" for n in differing[:4])
    hint = f"Leave these settings out to go on with {path}."
    require(not differing, "resume", f"the {what} configuration", expected, received, hint)
