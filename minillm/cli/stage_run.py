"""What `minillm sft` and `minillm grpo` share: options from a configuration's fields, the run's folder, going on.

The run's folder receives the effective configuration (config.json), metrics as JSON lines (metrics.jsonl) and
checkpoints. A run that was stopped goes on with --resume, to the bit as if it never had been.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from tqdm import tqdm

from minillm.alignment.stage import Stage, StageConfig
from minillm.checks import require, require_positive
from minillm.cli.output import print_json, print_table
from minillm.data import write_json
from minillm.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    checkpoints_in,
    keep_newest,
    latest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from minillm.training.metrics import MetricsLog
from minillm.training.step import available_cores

KEPT = 2  # checkpoints
COLUMNS = ["stage", "updates", "seconds", "greedy before", "sampled before", "greedy", "sampled"]
SHARED_HELP = {
    "updates": "optimiser updates",
    "lr": "learning rate after the warm-up; it falls along a cosine",
    "lr_end": "learning rate at the end, as a share of --lr",
    "warmup": "updates until the learning rate is reached",
    "max_norm": "the gradient is clipped to this length",
    "weight_decay": "decay of matrices",
    "beta1": "decay of Adam's first moment",
    "beta2": "decay of Adam's second moment",
    "evaluate_every": "updates between looks at the held-out problems (0: at the end)",
    "evaluate_samples": "sampled answers to each held-out problem",
    "threads": "threads that share a batch (default: all cores)",
    "seed": "seed of everything random",
}


def add_options(
    parser: argparse.ArgumentParser, config: type[StageConfig], own_help: Mapping[str, str], choices: Mapping[str, Any]
) -> None:
    """One option for every setting. They have no default here: what was chosen can be told from what was not."""
    parser.add_argument("--out", type=Path, help="the run's folder (default %(default)s)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this time; --resume goes on")
    parser.add_argument("--save-every", type=int, default=200, help="updates between checkpoints (default %(default)s)")
    parser.add_argument("--json", action="store_true", default=False, help="the result as JSON on standard output")
    settings = parser.add_argument_group("settings")
    kinds, helps = get_type_hints(config), {**SHARED_HELP, **own_help}
    for field in sorted(fields(config), key=lambda field: field.name not in own_help):
        option, kind = "--" + field.name.replace("_", "-"), kinds[field.name]
        kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind
        text = helps[field.name] + ("" if "default" in helps[field.name] else f" (default {field.default})")
        if kind is bool:
            settings.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        else:
            settings.add_argument(option, type=kind, choices=choices.get(field.name), help=text)


def fresh_config(args: argparse.Namespace, config: type[StageConfig], preset: Mapping[str, Any]) -> Any:
    """The configuration of a new run: the preset's settings, and the chosen ones over them."""
    hint = "Pass --resume to go on with it, or another --out."
    found = checkpoints_in(args.out)
    received = f"{args.out}, with {len(found)} checkpoints"
    require(not found, _command(args), "--out", "a folder without a run", received, hint)
    return config(**{"threads": available_cores(), **preset, **_chosen(args, config)})


def saved_config(args: argparse.Namespace, config: type[StageConfig], checkpoint: Checkpoint) -> Any:
    """The configuration that a run was started with; an option that differs from it is refused."""
    name = _command(args)
    stage = str(checkpoint.record.get("stage"))
    require(stage == name, name, "--out", f"the folder of a run of `minillm {name}`", f"one of the stage {stage}")
    saved = checkpoint.record["config"][name]
    chosen = _chosen(args, config)
    for setting, value in chosen.items():
        option = "--" + setting.replace("_", "-")
        same = saved.get(setting) == value or setting == "threads"
        require(same, name, option, f"{saved.get(setting)}, as in the run to resume", value, "Leave it out.")
    return config(**{**saved, **{k: v for k, v in chosen.items() if k == "threads"}})


def checkpoint_to_resume(args: argparse.Namespace) -> Checkpoint:
    """The newest checkpoint of the run's folder."""
    return read_checkpoint(latest_checkpoint(args.out))


def run_stage(stage: Stage, args: argparse.Namespace) -> int:
    """Do the updates that are left, with a progress bar, metrics, checkpoints and a table at the end."""
    name = _command(args)
    require_positive(args.save_every, name, "--save-every", integer=True)
    if args.seconds is not None:
        require_positive(args.seconds, name, "--seconds")
    args.out.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(args.out / "metrics.jsonl")
    log.rewind(stage.done if stage.done else -1)  # a run that stopped at 0 looks again
    write_json(args.out / "config.json", stage.effective_config)
    tell = sys.stderr if args.json else sys.stdout
    for part, values in stage.effective_config.items():
        print(f"{part}: " + ", ".join(f"{key}={value}" for key, value in values.items()), file=tell)
    print(f"{stage.model.count_parameters():,} parameters; writing to {args.out}", file=tell, flush=True)
    _loop(stage, args, log)
    rows = [_summary(stage, log.read())]
    print_json(rows) if args.json else print_table(rows, COLUMNS)
    return 0


def _loop(stage: Stage, args: argparse.Namespace, log: MetricsLog) -> None:
    earlier = max((line.get("seconds", 0.0) for line in log.read()), default=0.0)
    start, saved, shown = time.perf_counter(), stage.done if args.resume else -1, {}
    with tqdm(total=stage.config.updates, initial=stage.done, desc=stage.name, unit="update", file=sys.stderr) as bar:
        for metrics in stage.steps():
            seconds = time.perf_counter() - start
            out_of_time = args.seconds is not None and seconds > args.seconds
            log.append(**metrics, seconds=round(earlier + seconds, 3))
            bar.update(stage.done - bar.n)
            shown |= {
                k: f"{metrics[k]:.3f}" for k in ("loss", "reward", "entropy", "greedy", "sampled") if k in metrics
            }
            bar.set_postfix(shown, refresh=False)
            if stage.done - max(saved, 0) >= args.save_every or out_of_time:
                saved = _save(stage, args.out)
            if out_of_time:
                tqdm.write(f"{stage.name}: stopped after {seconds:.0f} s; --resume goes on.", file=sys.stderr)
                break
    if saved != stage.done:
        _save(stage, args.out)


def _save(stage: Stage, folder: Path) -> int:
    write_checkpoint(checkpoint_path(folder, stage.done), stage.checkpoint())
    keep_newest(folder, KEPT)
    return stage.done


def _summary(stage: Stage, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the run began and ended with; the end is measured now where it was not before."""
    looks = [line for line in lines if "sampled" in line]
    before = looks[0] if looks and looks[0]["step"] == 0 else {}
    after = looks[-1] if looks and looks[-1]["step"] == stage.done else stage.evaluate()
    return {
        "stage": stage.name,
        "updates": stage.done,
        "seconds": round(lines[-1]["seconds"], 1) if lines else 0.0,
        "greedy before": before.get("greedy"),
        "sampled before": before.get("sampled"),
        "greedy": after["greedy"],
        "sampled": after["sampled"],
    }


def _chosen(args: argparse.Namespace, config: type[StageConfig]) -> dict[str, Any]:
    return {field.name: vars(args)[field.name] for field in fields(config) if field.name in vars(args)}


def _command(args: argparse.Namespace) -> str:
    return args.stage
