"""`minillm sft`: teach an untrained policy to add, from demonstrations of which some carry a wrong digit.

Fitted to its teacher, the policy knows the answers (greedy decoding is nearly always right) but samples badly. That is
where `minillm grpo` starts.
"""

import argparse
from pathlib import Path

import numpy as np

from minillm.alignment import SFT, PolicySize, SFTConfig, fresh_policy
from minillm.cli.stage_run import add_options, checkpoint_to_resume, fresh_config, run_stage, saved_config
from minillm.data import AdditionTask

PRESETS = {"full": {}, "quick": {"updates": 300}}
HELP = {"batch": "demonstrations an update", "noise": "share of demonstrations with one wrong digit"}


def build(args: argparse.Namespace) -> SFT:
    """The stage, new or as it was saved; nothing is written before everything is right."""
    checkpoint = checkpoint_to_resume(args) if args.resume else None
    if checkpoint is None:
        config, size, digits = fresh_config(args, SFTConfig, PRESETS[args.preset]), PolicySize(), args.digits
        size = PolicySize(args.d_model, args.layers, args.heads, args.d_ff)
    else:
        config, saved = saved_config(args, SFTConfig, checkpoint), checkpoint.record["config"]
        size = PolicySize(*(saved["model"][key] for key in ("d_model", "n_layers", "n_heads", "d_ff")))
        digits = saved["task"]["digits"]
    task = AdditionTask(digits)
    stage = SFT(fresh_policy(task, size, np.random.default_rng(config.seed)), task, config)
    if checkpoint is not None:
        stage.restore(checkpoint)
    return stage


def run(args: argparse.Namespace) -> int:
    """Train and report."""
    return run_stage(build(args), args)


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "sft", help="supervised training on demonstrations", description=__doc__, argument_default=argparse.SUPPRESS
    )
    parser.set_defaults(run=run, stage="sft", out=Path("runs/sft"))
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="full", help="quick: half the updates (default %(default)s)"
    )
    parser.add_argument("--digits", type=int, default=2, help="of each number, 1 to 3 (default %(default)s)")
    size = PolicySize()
    for option, value, text in (
        ("--d-model", size.d_model, "width of the policy"),
        ("--layers", size.n_layers, "blocks"),
        ("--heads", size.n_heads, "attention heads"),
        ("--d-ff", size.d_ff, "inner width of the feed-forward network"),
    ):
        parser.add_argument(option, type=int, default=value, help=f"{text} (default %(default)s)")
    add_options(parser, SFTConfig, HELP, {})
