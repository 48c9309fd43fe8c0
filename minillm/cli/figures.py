"""`minillm figures`: draw every figure of the README and the docs again, from the measurements beside them."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from minillm import plotting
from minillm.checks import require_one_of
from minillm.cli import drawings, measurements
from minillm.data import write_json


@dataclass(frozen=True)
class Drawing:
    """A figure: what it shows, the function that draws it, and the command that measures its data anew."""

    shows: str
    draw: Callable[[Any], Figure]
    measured_by: str
    collect: Callable[[list[Path]], Any] | None = None


DRAWINGS = {
    "tour": Drawing("what the tour does", drawings.tour, "minillm tour"),
    "bench": Drawing(
        "a training step beside eager PyTorch", drawings.bench, "minillm bench --json > figures/data/bench.json"
    ),
    "text": Drawing(
        "learning the Python reference",
        drawings.text,
        "minillm train --minutes 10 --out runs/text; minillm figures text --runs runs/text",
        measurements.from_training_run,
    ),
    "grpo": Drawing(
        "learning to add from reward alone",
        drawings.grpo,
        "minillm sft and minillm grpo for each seed (--help says how); minillm figures grpo --runs runs/grpo-*",
        measurements.from_grpo_runs,
    ),
}


def run(args: argparse.Namespace) -> int:
    """Draw the chosen figures; one without data is named, with the command that measures it."""
    for name in args.names:
        require_one_of(name, DRAWINGS, "figures", "each name")
    if args.runs:
        collect = DRAWINGS[args.names[0]].collect if len(args.names) == 1 else None
        if collect is None:
            raise ValueError("figures: --runs goes with one of the figures text and grpo.")
        write_json(args.folder / "data" / f"{args.names[0]}.json", collect(args.runs))
    missing = 0
    for name in args.names or DRAWINGS:
        drawing, data = DRAWINGS[name], args.folder / "data" / f"{name}.json"
        if not data.is_file():
            missing += 1
            print(f"figures: {name} has no data at {data}. Measure it: {drawing.measured_by}", file=sys.stderr)
            continue
        figure = drawing.draw(json.loads(data.read_text(encoding="utf-8")))
        print(plotting.save(figure, args.folder / f"{name}.png"))
    return 1 if missing else 0


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("figures", help="draw every figure again", description=__doc__)
    names = "; ".join(f"{name}: {drawing.shows}" for name, drawing in DRAWINGS.items())
    parser.add_argument("names", nargs="*", help=f"which, all without ({names})")
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="take new data from the folders of runs")
    parser.add_argument("--folder", type=Path, default=Path("figures"), help="where figures and data/ are")
    parser.set_defaults(run=run)
