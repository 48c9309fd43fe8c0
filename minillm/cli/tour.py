"""`minillm tour`: the whole idea in a few minutes, on this machine, now.

Gradient checks, a transformer trained on real text, the same network learning to add from a reward alone, a Triton kernel
held against its NumPy reference, one figure of all of it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minillm import plotting
from minillm.alignment import GRPO, GRPOConfig, SFTConfig, new_sft
from minillm.autograd.gradcheck import check_row
from minillm.cli import drawings
from minillm.cli.everything import registered_rows
from minillm.data import (
    AdditionTask,
    BatchStream,
    ByteTokenizer,
    compressed_bits_per_byte,
    python_docs_text,
    split_held_out,
)
from minillm.decoding import generate
from minillm.models import Config, Decoder
from minillm.training.config import TrainingConfig
from minillm.training.loop import HeldOut, Trainer
from minillm.training.step import available_cores


@dataclass(frozen=True)
class Pace:
    """How much of everything: the full tour takes minutes, the quick one under one."""

    draws: int
    text_steps: int
    sft_updates: int
    grpo_updates: int
    examples: int


FULL = Pace(draws=4, text_steps=400, sft_updates=600, grpo_updates=200, examples=10)
QUICK = Pace(draws=1, text_steps=60, sft_updates=300, grpo_updates=20, examples=2)
PROMPT = "The "


def gradients(pace: Pace, rng: np.random.Generator) -> list[float]:
    """Check every registered function against finite differences; error over allowance of each form."""
    shares, failed = [], []
    for row in tqdm(registered_rows(), desc="gradient checks", unit="function", file=sys.stderr):
        for result in check_row(row, rng, pace.draws):
            shares.append(result.max_rel_error / result.allowed)
            if not result.passed:
                failed.append(result.name)
    print(f"  {len(shares)} forms of functions checked, {len(failed)} failed {failed or ''}")
    return shares


def text(pace: Pace, rng: np.random.Generator, folder: Path) -> dict[str, Any]:
    """Train a small decoder on the Python reference, byte by byte, and show what it writes."""
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(python_docs_text())
    train, held_out = split_held_out(tokens)
    held_out = held_out[:8192]
    size = Config(tokenizer.vocab_size, d_model=128, n_layers=3, n_heads=4, context=128, tied=True, init_std=0.05)
    model = Decoder(size, rng)
    config = TrainingConfig(
        steps=pace.text_steps, batch_size=16, n_ctx=128, lr=3e-3, warmup_steps=min(30, pace.text_steps),
        threads=available_cores(), validate_every=max(10, pace.text_steps // 10),
    )  # fmt: skip
    trainer = Trainer(
        model, BatchStream(train, 128, 16, rng), config, folder=folder, held_out=HeldOut(held_out, len(held_out)),
        tokenizer=tokenizer,
    )  # fmt: skip
    print(f"  before: {_sample(model, tokenizer)!r}")
    trainer.run()
    print(f"  after:  {_sample(model, tokenizer)!r}")
    curve = [
        {
            "step": line["step"],
            "train": line["loss"] / np.log(2) if "loss" in line else None,
            "held_out": line.get("bits_per_byte"),
        }
        for line in trainer.metrics.read()
    ]
    held_out_bytes = tokenizer.decode_bytes(held_out)
    compressors = {name: compressed_bits_per_byte(held_out_bytes, name) for name in ("gzip", "xz")}
    best = min(point["held_out"] for point in curve if point["held_out"] is not None)
    print(f"  held-out text: {best:.2f} bits per byte; compressors: " + _list(compressors))
    return {"curve": curve, "compressors": compressors, "parameters": model.count_parameters()}


def _sample(model: Decoder, tokenizer: ByteTokenizer) -> str:
    prompt = tokenizer.encode(PROMPT)[None]
    made = generate(model, prompt, 90, np.random.default_rng(0), temperature=0.7)
    return PROMPT + tokenizer.decode(made.tokens[0])


def _list(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def reward(pace: Pace, seed: int) -> dict[str, Any]:
    """Imitate a teacher who errs in 60 % of the cases, then improve by the verifier's reward alone."""
    task, threads = AdditionTask(), available_cores()
    sft = new_sft(task, SFTConfig(updates=pace.sft_updates, evaluate_every=0, threads=threads, seed=seed))
    for _ in _with_bar(sft.steps(), "imitation", pace.sft_updates):
        pass
    start = sft.evaluate()
    print(
        f"  after imitation:  greedy {start['greedy']:.2f}, sampled {start['sampled']:.2f} right on held-out problems"
    )
    every = max(1, pace.grpo_updates // 10)
    config = GRPOConfig(updates=pace.grpo_updates, evaluate_every=every, evaluate_samples=1, threads=threads, seed=seed)
    history = list(_with_bar(GRPO(sft.model, task, config).steps(), "GRPO", pace.grpo_updates))
    end = [metrics for metrics in history if "sampled" in metrics]
    print(
        f"  after GRPO:       greedy {end[-1]['greedy']:.2f}, sampled {end[-1]['sampled']:.2f}; no right answer was shown"
    )
    return {
        name: {"update": [m["step"] for m in end], "value": [m[name] for m in end]} for name in ("greedy", "sampled")
    }


def _with_bar(steps: Iterator[dict], what: str, total: int) -> Iterator[dict]:
    with tqdm(total=total, desc=what, unit="update", file=sys.stderr) as bar:
        for metrics in steps:
            bar.update(bool(metrics["step"]))
            yield metrics


def kernels(pace: Pace) -> list[float] | None:
    """Hold the norm kernels against their reference, in a process of their own; None where they cannot run."""
    command = [
        sys.executable,
        "-m",
        "kernels",
        "compare",
        "norm",
        "--examples",
        str(pace.examples),
        "--json",
        "--no-figure",
    ]
    probe = subprocess.run([sys.executable, "-c", "import torch, triton, kernels"], capture_output=True)
    if probe.returncode:
        print("  not run: this needs torch and triton (`minillm doctor` says more)")
        return None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    results = json.loads(done.stdout)
    failed = sorted({row["property"] for row in results if not row["passed"]})
    print(f"  {len(results)} properties on the {results[0]['backend']}, {len(failed)} failed {failed or ''}")
    return [row["measured"] / row["allowed"] if row["allowed"] else float(row["measured"] > 0) for row in results]


CLOSING = """
What to open next
  {figure}   this tour in one picture
  lessons/00_the_map.ipynb          the course; `make lessons` opens it
  minillm equations rmsnorm         one equation: formula, code, tests, lessons
  minillm train --help              pretrain on your own text; then `minillm generate`
  minillm grpo --help               the reward run in full
  python -m kernels compare --help  hold a kernel of your own against the reference
"""


def run(args: argparse.Namespace) -> int:
    """Take the tour."""
    pace, start = QUICK if args.quick else FULL, time.perf_counter()
    rng = np.random.default_rng(args.seed)
    data: dict[str, Any] = {}
    print("1 of 4  Is every gradient right?  (finite differences in float64)", flush=True)
    data["gradients"] = gradients(pace, rng)
    print("2 of 4  A transformer learns to write  (the Python reference, byte by byte)", flush=True)
    shutil.rmtree(args.checkpoints, ignore_errors=True)
    data["text"] = text(pace, rng, args.checkpoints)
    print("3 of 4  The same network learns to add from reward alone  (GRPO)", flush=True)
    data["reward"] = reward(pace, args.seed)
    print("4 of 4  Does the Triton kernel do what NumPy does?", flush=True)
    data["kernels"] = kernels(pace)
    args.folder.joinpath("data").mkdir(parents=True, exist_ok=True)
    _write_json(args.folder / "data" / "tour.json", data)
    figure = plotting.save(drawings.tour(data), args.folder / "tour.png")
    print(CLOSING.format(figure=str(figure).ljust(30)))
    print(f"The tour took {time.perf_counter() - start:.0f} seconds.")
    wrong = any(share > 1 for share in data["gradients"]) or any(share > 1 for share in data["kernels"] or [])
    return 1 if wrong else 0


def _write_json(path: Path, data: Any) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".part", encoding="utf-8") as part:
        json.dump(data, part, indent=1)
    Path(part.name).replace(path)


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("tour", help="the whole idea in a few minutes", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute: the same stations, less of each")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    parser.add_argument("--folder", type=Path, default=Path("figures"), help="where the figure and its data go")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/tour"), help="where the trained model goes")
    parser.set_defaults(run=run)
