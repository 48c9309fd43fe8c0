r"""`python -m kernels train`: what `minillm train` does, computed by the kernels.

The same settings, the same weights to begin with, the same batches in the same order, the same files (config.json,
metrics.jsonl, checkpoints, report.json); either side goes on from the other's checkpoints. The NumPy trainer keeps
the run; here the network and its optimiser take its steps, on the GPU or, without one, in Triton's interpreter, which
is right and very slow. Samples are drawn by the NumPy model from the same weights.

Equation: `training-step` forward, loss, backward, clip, optimiser, schedule

Under `torchrun` every process takes its share of the sequences of each batch and gradients are added
(DistributedDataParallel); the first process writes. With ``--precision bfloat16`` (or float16) the network holds 16-bit
weights and the optimiser float32 masters; checkpoints hold the masters.
"""

import argparse
import contextlib
import math
import os
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import triton
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kernels import launching
from kernels.adamw.op import AdamW
from kernels.transformer import Decoder
from minillm.checks import require
from minillm.cli import train as numpy_train
from minillm.data import IGNORE
from minillm.training.evaluate import Evaluation, windows
from minillm.training.loop import Trainer

EVALUATED = 64  # sequences at a time
SLOW = (
    "no GPU: the kernels run in Triton's interpreter, which is right and thousands of times slower. "
    "`minillm train` is fast on a CPU."
)


class KernelTrainer(Trainer):
    r"""A `Trainer` whose steps and evaluations the kernels compute; ``model`` and ``optimizer`` are copies for the files.

    Equation: `training-step` forward, loss, backward, clip, optimiser, schedule
    Equation: `grad-accumulation` batches of a step, and shares of processes, are weighted by their token counts
    Raises: ValueError for a model that is not a LLaMA, or a batch with fewer sequences than processes.
    Source: topics #8.
    """

    def __init__(
        self, model: Any, stream: Any, config: Any, *, precision: str = "float32", device: str | None = None,
        **options: Any,
    ):  # fmt: skip
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        require(config.batch_size >= self.world, "train", "--batch-size", f"at least {self.world}, the processes",
                config.batch_size)  # fmt: skip
        self.leads = self.rank == 0
        if not self.leads:
            options = {**options, "folder": None, "held_out": None, "on_look": None, "show_progress": False}
        super().__init__(model, stream, config, **options)
        self.device = place_of_work(self.rank) if device is None else device
        self.network = Decoder(model.config, device=self.device, dtype=getattr(torch, precision))
        s = self.optimizer
        self.masters = AdamW(self._parameters(), s.lr, (s.betas[0], s.betas[1]), s.eps, s.weight_decay)
        self._push()
        self.whole: nn.Module = (
            self.network if self.world == 1 else DistributedDataParallel(self.network, broadcast_buffers=False)
        )
        self._stale = False
        if self.world > 1:
            dist.barrier()  # nobody writes before everybody has looked at the folder

    def update(self) -> tuple[float, float]:
        """Move the network's parameters by the next batches; returns their loss and the length of the gradient."""
        questions = [self.objective.ask(self.stream.next_batch(), self.rng) for _ in range(self.config.accumulate)]
        divisor = float(max(1, sum(int((q.targets != IGNORE).sum()) for q in questions)))
        self.network.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i, question in enumerate(questions):
            ids, targets = (self._share(a) for a in (*question.reads, question.targets))
            last = i == len(questions) - 1
            waiting = contextlib.nullcontext() if last or self.world == 1 else self.whole.no_sync()  # type: ignore[operator]
            with waiting:
                # Processes' gradients are averaged, and the loss is a sum: hence times their number.
                loss = self.whole(ids, targets, divisor / self.world)
                loss.backward()
            total += loss.detach() / self.world
        if self.world > 1:
            dist.all_reduce(total)
        loss = float(total)
        if not math.isfinite(loss):
            raise FloatingPointError(self._divergence(f"the loss must be finite, got {loss}"))
        self.masters.lr = self.optimizer.lr = self.config.learning_rate(self.step + 1)
        try:
            norm = self.masters.step(self.config.max_norm)
        except FloatingPointError as error:
            raise FloatingPointError(self._divergence("the gradient must be finite, got NaN or infinity")) from error
        self._stale = True
        return loss, norm

    @torch.no_grad()
    def evaluate(self, tokens: np.ndarray, stride: int | None = None) -> Evaluation:
        """How well the network predicts a text now."""
        n_ctx = min(self.config.n_ctx, len(tokens) - 1)
        inputs, targets = windows(tokens.astype(np.int64), n_ctx, stride or self.config.n_ctx)
        nll = 0.0
        for start in range(0, len(inputs), EVALUATED):
            rows = slice(start, start + EVALUATED)
            nll += float(self.network(self._tensor(inputs[rows]), self._tensor(targets[rows]), 1.0))
        return Evaluation(nll, len(tokens) - 1)

    def look(self) -> None:
        """Validate; samples are the NumPy model's."""
        self._pull()
        super().look()

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self._pull()
        super().save()

    def resume(self, path: str | os.PathLike) -> None:
        """Go back to where a checkpoint was written, by this side or by the other."""
        super().resume(path)
        self._push()
        if self.world > 1:
            dist.barrier()

    def versions(self) -> dict[str, Any]:
        """What the last bits of the run depend on: the other engine does not reproduce them."""
        device = "interpreter" if launching.INTERPRETED else torch.cuda.get_device_name(self.device)
        engine = f"kernels on {device}, torch {torch.__version__}, triton {triton.__version__}, {self.world} processes"
        return {**super().versions(), "engine": f"{engine}, {self.network.embedding.weight.dtype}"}

    def _parameters(self) -> list[nn.Parameter]:
        """The network's parameters in the order of the NumPy model's, by which the optimiser's state is numbered."""
        named = dict(self.network.named_parameters())
        return [named[name] for name, _ in self.model.named_parameters()]

    def _share(self, array: np.ndarray) -> Tensor:
        return self._tensor(np.array_split(array, self.world)[self.rank])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device)

    @torch.no_grad()
    def _push(self) -> None:
        """Weights and moments from the NumPy side to the device."""
        state: dict[str, Any] = dict(self.optimizer.state_dict())
        for i, (theirs, ours) in enumerate(zip(self.model.parameters(), self.masters.parameters)):
            ours.copy_(torch.from_numpy(theirs.data))
            if ours.dtype != torch.float32:
                state[f"master.{i}"] = theirs.data
        self.masters.load_state_dict(state)
        self._stale = False

    def _pull(self) -> None:
        """Weights and moments from the device to the NumPy side, where checkpoints and samples are made."""
        if self._stale:
            for theirs, ours in zip(self.model.parameters(), self.masters.weights()):
                theirs.data[...] = ours.cpu().numpy()
            state = {name: tensor.cpu().numpy() for name, tensor in self.masters.state_dict().items()}
            self.optimizer.load_state_dict({n: a for n, a in state.items() if not n.startswith("master.")})
            self._stale = False


def place_of_work(rank: int = 0) -> str:
    """A GPU of its own for each process, or the CPU where kernels are interpreted."""
    if launching.INTERPRETED:
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', rank))}"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand: all options of `minillm train`, and the precision."""
    numpy_train.add_parser(subparsers)
    parser = subparsers.choices["train"]
    parser.description = "minillm train's settings and files, computed by the kernels."
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16", "float16"], default="float32",
        help="of the network; the optimiser keeps float32 (default %(default)s)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Train as the options say; the exit code."""
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if together:
        if not launching.INTERPRETED:
            torch.cuda.set_device(place_of_work())
        dist.init_process_group("gloo" if launching.INTERPRETED else "nccl")
    if launching.INTERPRETED and int(os.environ.get("RANK", "0")) == 0:
        print(SLOW, file=sys.stderr)
    require(not (together and options.minutes), "train", "--minutes", "left out under torchrun", options.minutes)

    def kind(*arguments: Any, **keywords: Any) -> KernelTrainer:
        return KernelTrainer(*arguments, precision=options.precision, **keywords)

    try:
        with np.errstate(all="ignore"):  # the interpreter computes masked-out lanes too
            return numpy_train.run(options, kind)
    finally:
        if together:
            dist.destroy_process_group()
