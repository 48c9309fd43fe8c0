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
from minillm.cli import drawings


@dataclass(frozen=True)
class Drawing:
    """A figure: what it shows, the function that draws it, and the command that measures its data anew."""

    shows: str
    draw: Callable[[Any], Figure]
    measured_by: str


DRAWINGS = {
    "tour": Drawing("what `minillm tour` does", drawings.tour, "minillm tour"),
    "bench": Drawing(
        "a training step beside eager PyTorch", drawings.bench, "minillm bench --json > figures/data/bench.json"
    ),
    "text": Drawing(
        "learning the Python reference",
        drawings.text,
        "minillm train --data python-docs --minutes 10 --report figures/data/text.json",
    ),
    "grpo": Drawing(
        "learning to add from reward alone", drawings.grpo, "minillm grpo --seeds 0 1 2 --report figures/data/grpo.json"
    ),
}


def run(args: argparse.Namespace) -> int:
    """Draw the chosen figures; one without data is named, with the command that measures it."""
    missing = 0
    for name in args.names or DRAWINGS:
        drawing, data = DRAWINGS[name], args.folder / "data" / f"{name}.json"
        if not data.is_file():
            missing += 1
            print(f"figures: {name} has no data at {data}. Measure it with: {drawing.measured_by}", file=sys.stderr)
            continue
        figure = drawing.draw(json.loads(data.read_text(encoding="utf-8")))
        print(plotting.save(figure, args.folder / f"{name}.png"))
    return 1 if missing else 0


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("figures", help="draw every figure again", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*DRAWINGS, []], help="which; all without")
    parser.add_argument("--folder", type=Path, default=Path("figures"), help="where figures and data/ are")
    parser.set_defaults(run=run)
