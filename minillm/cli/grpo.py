"""`minillm grpo`: improve a policy that `minillm sft` has saved, by the verifier's reward alone.

One run for each of three seeds, and the figure of all of them:

  for s in 0 1 2; do minillm sft --seed $s --out runs/sft-$s; done
  for s in 0 1 2; do minillm grpo --seed $s --policy runs/sft-$s --out runs/grpo-$s; done
  minillm figures grpo --runs runs/grpo-*
"""

import argparse
from pathlib import Path

from minillm.alignment import GRPO, GRPOConfig
from minillm.checks import require
from minillm.cli.stage_run import add_options, checkpoint_to_resume, fresh_config, run_stage, saved_config
from minillm.data import AdditionTask
from minillm.functional.advantages import ADVANTAGES
from minillm.functional.kl_estimators import ESTIMATORS
from minillm.functional.reductions import REDUCTIONS
from minillm.models import Decoder
from minillm.training.checkpoint import latest_checkpoint
from minillm.training.restore import load_model

PRESETS = {"full": {}, "quick": {"updates": 200}}
HELP = {
    "prompts": "prompts an update",
    "group": "responses to each prompt",
    "temperature": "of sampling, and of the log-probabilities in the ratio",
    "advantage": "how a reward is compared with its group",
    "ddof": "of the standard deviation: 0 population, 1 unbiased",
    "eps": "added to the standard deviation",
    "clip_low": "how far the ratio may fall before its gradient is cut",
    "clip_high": "how far it may rise (default: as --clip-low)",
    "beta": "weight of the divergence from the policy at the start",
    "kl": "its estimator",
    "reduction": "what the loss is divided by",
    "epochs": "passes over a rollout",
    "minibatches": "steps in a pass",
    "dynamic_sampling": "replace groups with equal rewards by further prompts",
}
CHOICES = {"advantage": ADVANTAGES, "kl": list(ESTIMATORS), "reduction": REDUCTIONS, "ddof": (0, 1)}


def build(args: argparse.Namespace) -> GRPO:
    """The stage, new or as it was saved; nothing is written before everything is right."""
    checkpoint = checkpoint_to_resume(args) if args.resume else None
    if checkpoint is None:
        config = fresh_config(args, GRPOConfig, PRESETS[args.preset])
    else:
        config = saved_config(args, GRPOConfig, checkpoint)
    hint = "`minillm sft` makes one."
    require(args.resume or args.policy.exists(), "grpo", "--policy", "a checkpoint or the folder of a run",
            f"{args.policy}, which does not exist", hint, error=FileNotFoundError)  # fmt: skip
    restored = load_model(latest_checkpoint(args.out if args.resume else args.policy))
    task = AdditionTask(restored.checkpoint.record["config"].get("task", {}).get("digits", 2))
    known = restored.tokenizer == task.tokenizer
    received = f"{restored.path}, with another tokenizer"
    require(known, "grpo", "--policy", "one for sums, with the tokenizer of the task", received, hint)
    policy = restored.model
    require(isinstance(policy, Decoder), "grpo", "--policy", "a decoder", f"a {type(policy).__name__}", hint)
    assert isinstance(policy, Decoder)
    stage = GRPO(policy, task, config)
    if checkpoint is not None:
        stage.restore(checkpoint)
    return stage


def run(args: argparse.Namespace) -> int:
    """Train and report."""
    return run_stage(build(args), args)


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "grpo", help="improve a policy by a verifiable reward", description=__doc__,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run, stage="grpo", out=Path("runs/grpo"))
    parser.add_argument(
        "--policy",
        type=Path,
        default=Path("runs/sft"),
        help="where to start: a checkpoint or run (default %(default)s)",
    )
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="full", help="quick: a quarter of the updates (default %(default)s)"
    )
    add_options(parser, GRPOConfig, HELP, CHOICES)
