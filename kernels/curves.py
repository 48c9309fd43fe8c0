"""`python -m kernels.curves`: the loss of one run computed by NumPy and by the kernels, and how far apart they are.

Trains the same settings twice, by `minillm train` and by `python -m kernels train`, and draws both curves. Without a
GPU nothing is trained: the interpreter is too slow for a curve worth looking at. ``--runs`` draws two runs that exist.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kernels import mode
from minillm import plotting
from minillm.checks import require
from minillm.training.checkpoint import latest_checkpoint, read_checkpoint
from minillm.training.metrics import MetricsLog


def losses(run: Path) -> dict[int, float]:
    """Training losses of a run's folder by step."""
    found = {line["step"]: line["loss"] for line in MetricsLog(run / "metrics.jsonl").read() if "loss" in line}
    require(bool(found), "curves", "--runs", "folders of runs with metrics", str(run))
    return found


def engine(run: Path) -> str:
    """What computed a run, as its newest checkpoint has it."""
    return read_checkpoint(latest_checkpoint(run)).record["versions"].get("engine", "minillm on NumPy")


def compare(numpy_run: Path, kernels_run: Path) -> dict[str, Any]:
    """Both curves and their distance, at the steps that both have."""
    a, b = losses(numpy_run), losses(kernels_run)
    steps = sorted(a.keys() & b.keys())
    return {
        "steps": steps,
        "numpy": [a[s] for s in steps],
        "kernels": [b[s] for s in steps],
        "engines": [engine(numpy_run), engine(kernels_run)],
        "largest_difference": max(abs(a[s] - b[s]) for s in steps),
    }


def draw(found: dict[str, Any]) -> Figure:
    """Both curves on each other, and the distance between them below."""
    figure, (above, below) = plotting.new_figure(2, 1, height=5.4)
    above.plot(found["steps"], found["numpy"], color=plotting.ORANGE, linewidth=5, alpha=0.6, label=found["engines"][0])
    above.plot(found["steps"], found["kernels"], color=plotting.BLUE, linewidth=1.2, label=found["engines"][1])
    above.set(ylabel="loss, nats per token", title="The same run by two engines")
    above.legend(fontsize=8)
    distance = [max(abs(a - b), 1e-9) for a, b in zip(found["numpy"], found["kernels"])]
    below.semilogy(found["steps"], distance, color=plotting.VERMILION, linewidth=1)
    below.set(xlabel="step", ylabel="distance of the losses")
    return figure


def train_both(folder: Path, options: Sequence[str]) -> tuple[Path, Path]:
    """One run by each engine."""
    runs = folder / "numpy", folder / "kernels"
    for module, run in zip(("minillm", "kernels"), runs):
        command = [sys.executable, "-m", module, "train", *options, "--no-samples", "--out", str(run)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; options that it does not know go to both runs."""
    parser = argparse.ArgumentParser(prog="python -m kernels.curves", description=__doc__)
    parser.add_argument("--runs", nargs=2, type=Path, metavar=("NUMPY", "KERNELS"), help="folders of two runs")
    parser.add_argument("--folder", type=Path, default=Path("runs/curves"), help="where new runs go")
    parser.add_argument(
        "--figure", type=Path, default=Path("figures/kernels_curves.png"), help="where the picture goes"
    )
    options, rest = parser.parse_known_args(arguments)
    if options.runs is None and not mode.has_gpu():
        print("no GPU: not measured", file=sys.stderr)
        return 0
    found = compare(*(options.runs or train_both(options.folder, rest or ["--preset", "tiny"])))
    print(plotting.save(draw(found), options.figure), file=sys.stderr)
    print(json.dumps({name: found[name] for name in ("engines", "largest_difference")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
