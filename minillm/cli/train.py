"""`minillm train`: train a transformer of any family on the Python reference, on text of your own, or on a synthetic language.

The run's folder receives the effective configuration (config.json), metrics as JSON lines (metrics.jsonl), checkpoints,
and at the end a report that holds the model against general-purpose compressors or against the language's entropy rate
(report.json). A run that was stopped goes on with --resume, to the bit as if it never had been.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minillm.checks import message, require, require_positive
from minillm.cli import presets
from minillm.cli.corpus import TOKENIZERS, Corpus, DataSettings, read_corpus
from minillm.cli.output import print_json, print_table
from minillm.cli.training_report import COLUMNS, report
from minillm.data import BatchStream, read_json, write_json
from minillm.decoding import generate
from minillm.decoding.conditional import writer
from minillm.models import Config
from minillm.models.making import make_model
from minillm.optim.schedules import SCHEDULES
from minillm.training.checkpoint import checkpoints_in, latest_checkpoint
from minillm.training.config import TrainingConfig
from minillm.training.loop import HeldOut, Trainer
from minillm.training.step import available_cores

LOOK_TOKENS = 8192  # of the held-out part, for the validation as training goes; the report reads all of it
SHARE_FOR_STEPS = 0.93  # of --minutes; the rest is for validation, checkpoints and the report


def build_trainer(
    model: Config,
    training: TrainingConfig,
    data: DataSettings,
    corpus: Corpus,
    kind: Callable[..., Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    """A trainer with fresh weights; model, batches and samples each have a generator of their own."""
    made = make_model(model, np.random.default_rng([training.seed, 0]))
    stream = BatchStream(corpus.train, training.n_ctx, training.batch_size, np.random.default_rng([training.seed, 1]))
    return kind(
        made,
        stream,
        training,
        tokenizer=corpus.tokenizer,
        extra_config={"data": data.to_dict()},
        **options,
    )


def steps_in(
    minutes: float,
    model: Config,
    training: TrainingConfig,
    data: DataSettings,
    corpus: Corpus,
    kind: Callable[..., Trainer] = Trainer,
) -> int:
    """How many steps fit into a time, from a few steps of a run that is thrown away."""
    require_positive(minutes, "train", "--minutes")
    trial = build_trainer(model, training, data, corpus, kind, show_progress=False)
    seconds: list[float] = []
    with trial.threads.running():
        trial.train_step()
        while len(seconds) < 3 or (sum(seconds) < 0.02 * 60 * minutes and len(seconds) < 50):
            before = trial.seconds
            trial.train_step()
            seconds.append(trial.seconds - before)
    return max(1, int(SHARE_FOR_STEPS * 60 * minutes / statistics.median(seconds)))


def show_sample(trainer: Trainer, prompt: str, length: int = 120) -> None:
    """Print what the model writes now, above the progress bar, and keep it with the metrics."""
    if trainer.tokenizer is None or trainer.model.config.architecture == "encoder":
        return
    model, ids = writer("train", trainer.model, trainer.tokenizer.encode(prompt))
    room = model.config.context + 1 - ids.shape[1]
    made = generate(model, ids, min(length, room), np.random.default_rng(trainer.config.seed), temperature=0.8)
    text = prompt + trainer.tokenizer.decode(made.tokens[0])
    trainer.metrics.append(step=trainer.step, sample=text)
    tqdm.write(f"step {trainer.step}: {text!r}", file=sys.stderr)


def prepare(args: argparse.Namespace, kind: Callable[..., Trainer] = Trainer) -> tuple[Trainer, Corpus, dict[str, Any]]:
    """The trainer, new or resumed, its data and its settings; nothing is written before all of them are right."""
    chosen = {k: v for k, v in vars(args).items() if k in presets.MODEL | presets.TRAINING | presets.DATA}
    if args.resume:
        settings = resumed_settings(args, chosen)
    else:
        hint = "Pass --resume to go on with it, or another --out."
        found = checkpoints_in(args.out)
        require(
            not found, "train", "--out", "a folder without a run", f"{args.out}, with {len(found)} checkpoints", hint
        )
        preset = args.preset or presets.preset_for(chosen.get("data", "python-docs"))
        settings = presets.settings_from({"threads": available_cores(), **chosen}, preset)
    require(bool(args.prompt), "train", "--prompt", "a text", "an empty one")
    data = presets.data_settings(settings)
    training = presets.training_config(settings)
    corpus = read_corpus(data)
    model = presets.model_config(settings, corpus.vocab_size)
    if args.minutes is not None:
        require(not args.resume, "train", "--minutes", "left out with --resume", args.minutes)
        fitting = min(settings["steps"], steps_in(args.minutes, model, training, data, corpus, kind))
        settings |= presets.shortened(settings, fitting)
        if "warmup_steps" in chosen:
            settings["warmup_steps"] = min(chosen["warmup_steps"], fitting)
        training = presets.training_config(settings)
    look = corpus.held_out[:LOOK_TOKENS]
    n_bytes = len(corpus.tokenizer.decode_bytes(look)) if corpus.tokenizer is not None else None
    trainer = build_trainer(
        model,
        training,
        data,
        corpus,
        kind,
        folder=args.out,
        held_out=HeldOut(look, n_bytes),
        on_look=(lambda trainer: show_sample(trainer, args.prompt)) if args.samples else None,
    )
    return trainer, corpus, settings


def resumed_settings(args: argparse.Namespace, chosen: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run was started with; an option that differs from them is refused."""
    path = args.out / "config.json"
    require(path.is_file(), "train", "--out", "the folder of a run to resume", str(args.out), error=FileNotFoundError)
    saved = read_json(path, "train")
    try:
        settings = presets.flatten(saved)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            message("train", f"the file {path}", "the configuration of a run", f"another ({error})")
        ) from error
    for name, value in chosen.items():
        option = "--" + name.replace("_", "-")
        same = settings.get(name) == value or name == "threads"
        require(same, "train", option, f"{settings.get(name)}, as in the run to resume", value, "Leave it out.")
    return {**settings, **{k: v for k, v in chosen.items() if k == "threads"}}


def announce(args: argparse.Namespace, trainer: Trainer, corpus: Corpus) -> None:
    """Save the effective configuration and say it."""
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "config.json", trainer.effective_config)
    tell = sys.stderr if args.json else sys.stdout
    for part, values in trainer.effective_config.items():
        print(f"{part}: " + ", ".join(f"{name}={value}" for name, value in values.items()), file=tell)
    print(
        f"{trainer.model.count_parameters():,} parameters; {len(corpus.train):,} tokens to train on, "
        f"{len(corpus.held_out):,} held out; writing to {args.out}",
        file=tell,
        flush=True,
    )


def run(args: argparse.Namespace, kind: Callable[..., Trainer] = Trainer) -> int:
    """Train and report. ``kind`` makes the trainer: another engine's takes the same settings and writes the same files."""
    start = time.perf_counter()
    trainer, corpus, _ = prepare(args, kind)
    if args.resume and checkpoints_in(args.out):
        trainer.resume(latest_checkpoint(args.out))
    else:
        trainer.metrics.rewind(-1)  # of a run that was killed before its first checkpoint
    if trainer.leads:
        announce(args, trainer, corpus)
    trainer.run()
    if not trainer.leads:
        return 0
    rows = report(trainer, corpus)
    write_json(args.out / "report.json", rows)
    if args.json:
        print_json(rows)
    else:
        print(
            f"{trainer.step} steps, {trainer.seconds:.0f} s of training, {time.perf_counter() - start:.0f} s in all\n"
        )
        print_table(rows, COLUMNS)
    return 0


def add_parser(subparsers) -> None:
    """Add the subcommand. Settings have no default here, so that what was chosen can be told from the preset."""
    parser = subparsers.add_parser(
        "train", help="train a transformer on text", description=__doc__, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="the run's folder (default %(default)s)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out")
    parser.add_argument("--preset", choices=list(presets.PRESETS), default=None, help="sizes and settings by name")
    parser.add_argument("--prompt", default="The ", help="what samples start with (default %(default)r)")
    parser.add_argument(
        "--no-samples", dest="samples", action="store_false", default=True, help="no samples as it goes"
    )
    parser.add_argument(
        "--json", action="store_true", default=False, help="the report as one JSON array on standard output"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="python-docs, synthetic, or a text file or folder (default python-docs)")
    data.add_argument("--held-out", type=float, help="the share at the end that is not trained on")
    data.add_argument("--tokenizer", choices=TOKENIZERS, help="bytes, or byte pairs learnt from the training part")
    data.add_argument("--vocab-size", type=int, help="ids of the learnt tokenizer")
    data.add_argument("--synthetic-tokens", type=int, help="length of the synthetic text")
    model = parser.add_argument_group("model")
    model.add_argument("--d-model", type=int, help="width")
    model.add_argument("--layers", dest="n_layers", type=int, help="blocks")
    model.add_argument("--heads", dest="n_heads", type=int, help="query heads")
    model.add_argument("--kv-heads", dest="n_kv_heads", type=int, help="key and value heads")
    model.add_argument("--d-ff", type=int, help="inner width of the feed-forward network")
    model.add_argument("--context", type=int, help="tokens that the model sees")
    model.add_argument("--tied", action=argparse.BooleanOptionalAction, help="head shared with the embedding")
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimiser steps")
    length.add_argument(
        "--minutes", type=float, default=None, help="fewer steps, if the preset's would take longer than this"
    )
    training.add_argument("--batch-size", type=int, help="sequences in a batch")
    training.add_argument("--accumulate", type=int, help="batches in a step")
    training.add_argument("--lr", type=float, help="largest learning rate")
    training.add_argument("--lr-min", type=float, help="learning rate at the end, as a share of --lr")
    training.add_argument("--schedule", choices=SCHEDULES, help="course of the learning rate")
    training.add_argument("--warmup-steps", type=int, help="steps until the learning rate is reached")
    training.add_argument("--weight-decay", type=float, help="decay of matrices")
    training.add_argument("--max-norm", type=float, help="the gradient is clipped to this length")
    training.add_argument("--seed", type=int, help="seed of weights, batches and the synthetic text")
    training.add_argument("--threads", type=int, help="threads that share a batch")
    training.add_argument("--validate-every", type=int, help="steps between validations (0: at the end)")
    training.add_argument("--checkpoint-every", type=int, help="steps between checkpoints (0: at the end)")
    parser.set_defaults(run=run)
