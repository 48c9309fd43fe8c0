"""`minillm bench`: this engine beside eager PyTorch on the same CPU."""

import argparse
import json
import statistics
import subprocess
import sys
import time

from tqdm import tqdm

from minillm.checks import require_positive
from minillm.cli.benchmark.cases import CASES
from minillm.cli.output import print_json, print_table
from minillm.training.step import available_cores

COLUMNS = ["case", "ours_s", "peer", "peer_s", "ratio", "spread", "floor_s", "of_floor", "ours_mib", "peer_mib", "runs"]
PAUSE = 0.25  # seconds between two turns, so that the other side's idle worker threads have gone to sleep


class Side:
    """A worker process that takes timed steps when told to and sleeps in between."""

    def __init__(self, side: str, case: str, threads: int):
        command = [sys.executable, "-m", "minillm.cli.benchmark.worker", side, case, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self, steps: int) -> dict:
        """Take one untimed and some timed steps."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("bench: a worker process ended without an answer; its message is above.")
        time.sleep(PAUSE)
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure_case(name: str, rounds: int, threads: int, with_torch: bool, progress: tqdm) -> dict:
    """Alternate the sides for some rounds; medians of their times and of the ratio of each round."""
    case = CASES[name]
    sides = {side: Side(side, name, threads) for side in (["ours", "torch"] if with_torch else ["ours"]) + ["floor"]}
    turns: dict[str, list[dict]] = {side: [] for side in sides}
    try:
        for _ in range(rounds):
            for side, worker in sides.items():
                turns[side].append(worker.turn(case.steps))
                progress.update()
    finally:
        for worker in sides.values():
            worker.close()
    seconds = {side: [turn["seconds"] for turn in turns[side]] for side in sides}
    median = {side: statistics.median(times) for side, times in seconds.items()}
    ratios = [ours / peer for ours, peer in zip(seconds["ours"], seconds.get("torch", []), strict=False)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [None, None, None]
    return {
        "case": f"train {name}",
        "ours_s": median["ours"],
        "peer": "torch eager" if ratios else None,
        "peer_s": median.get("torch"),
        "ratio": statistics.median(ratios) if ratios else None,
        "spread": [quartiles[0], quartiles[2]],
        "floor_s": median["floor"],
        "of_floor": median["ours"] / median["floor"],
        "ours_mib": turns["ours"][-1]["step_mib"],
        "peer_mib": turns["torch"][-1]["step_mib"] if ratios else None,
        "runs": rounds,
        "threads": threads,
    }


def has_torch() -> bool:
    """Whether PyTorch can be imported, found out in another process so that this one stays light."""
    return subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0


def run(args: argparse.Namespace) -> int:
    """Measure the chosen cases and print them."""
    require_positive(args.rounds, "bench", "--rounds", integer=True)
    require_positive(args.threads, "bench", "--threads", integer=True)
    with_torch = has_torch()
    if not with_torch:
        print("bench: torch is not installed, so there is no peer; floor and our own times only.", file=sys.stderr)
    rows = []
    n_sides = 3 if with_torch else 2
    with tqdm(total=len(args.case) * args.rounds * n_sides, file=sys.stderr, desc="bench", unit="turn") as progress:
        for name in args.case:
            rows.append(measure_case(name, args.rounds, args.threads, with_torch, progress))
    print_json(rows) if args.json else print_table(rows, COLUMNS)
    return 0


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("bench", help="training steps beside eager PyTorch on this CPU", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="sizes to measure")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of alternation (default %(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, available_cores()), help="threads for each side")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.set_defaults(run=run)
