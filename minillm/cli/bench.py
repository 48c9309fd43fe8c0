"""`minillm bench`: this engine beside eager PyTorch on the same CPU."""

import argparse
import json
import statistics
import subprocess
import sys
import time

from tqdm import tqdm

from minillm.checks import MissingPackageError, require_one_of, require_positive
from minillm.cli.benchmark.families import Family
from minillm.cli.benchmark.table import FAMILIES
from minillm.cli.output import print_json, print_table
from minillm.training.step import available_cores

COLUMNS = ["case", "ours_s", "peer", "peer_s", "ratio", "spread", "floor_s", "of_floor", "ours_mib", "peer_mib", "runs"]
PAUSE = 0.25  # seconds between two turns, so that the other side's idle worker threads have gone to sleep


class Side:
    """A worker process that takes timed steps when told to and sleeps in between."""

    def __init__(self, family: str, case: str, side: str, threads: int):
        command = [sys.executable, "-m", "minillm.cli.benchmark.worker", family, case, side, str(threads)]
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


def sides_of(family: Family, with_torch: bool) -> list[str]:
    """The sides of a family that can run here, ours first."""
    return ["ours", *(side for side in family.sides if side != "ours" and (with_torch or side != "torch"))]


def measure_case(family: Family, name: str, rounds: int, threads: int, with_torch: bool, progress: tqdm) -> dict:
    """Alternate the sides for some rounds; medians of their times and of the ratio of each round."""
    case = family.cases[name]
    sides = {side: Side(family.name, name, side, threads) for side in sides_of(family, with_torch)}
    turns: dict[str, list[dict]] = {side: [] for side in sides}
    try:
        for _ in range(rounds):
            for side, worker in sides.items():
                turns[side].append(worker.turn(case.steps))
                progress.update()
    finally:
        for worker in sides.values():
            worker.close()
    if family.same_answer:
        check_answers(f"{family.name} {name}", {side: turns[side][-1]["value"] for side in turns if side != "floor"})
    seconds = {side: [turn["seconds"] for turn in turns[side]] for side in sides}
    median = {side: statistics.median(times) for side, times in seconds.items()}
    ratios = [ours / peer for ours, peer in zip(seconds["ours"], seconds.get(family.peer_side, []), strict=False)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [None, None, None]
    return {
        "case": f"{family.name} {name}",
        "ours_s": median["ours"],
        "peer": family.peer if ratios else None,
        "peer_s": median.get(family.peer_side),
        "ratio": statistics.median(ratios) if ratios else None,
        "spread": [quartiles[0], quartiles[2]],
        "floor_s": median.get("floor"),
        "of_floor": median["ours"] / median["floor"] if "floor" in median else None,
        "ours_mib": turns["ours"][-1]["step_mib"],
        "peer_mib": turns[family.peer_side][-1]["step_mib"] if ratios else None,
        "runs": rounds,
        "threads": threads,
        **family.columns(case, median),
    }


def check_answers(case: str, values: dict[str, float]) -> None:
    """Refuse to compare times of sides that did not do the same.

    Raises: RuntimeError if some side returned another value than ours.
    """
    for side, value in values.items():
        if value != values["ours"]:
            raise RuntimeError(f"bench: {case}: ours and {side} must give the same, got {values['ours']} and {value}.")


def has_torch() -> bool:
    """Whether PyTorch can be imported, found out in another process so that this one stays light."""
    return subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0


def chosen_cases(families: list[str], names: list[str] | None) -> list[tuple[Family, str]]:
    """The cases asked for; a name belongs to every chosen family that has it."""
    known = [(FAMILIES[family], name) for family in families for name in FAMILIES[family].cases]
    for name in names or []:
        require_one_of(name, [known_name for _, known_name in known], "bench", "--case")
    chosen = []
    for family, name in known:
        lacking = family.missing()
        if names is None and lacking:
            print(f"bench: {family.name} {name} is left out: {lacking}.", file=sys.stderr)
        elif names is None or name in names:
            if lacking:
                raise MissingPackageError(f"bench: {lacking}.")
            chosen.append((family, name))
    return chosen


def run(args: argparse.Namespace) -> int:
    """Measure the chosen cases and print them."""
    require_positive(args.rounds, "bench", "--rounds", integer=True)
    require_positive(args.threads, "bench", "--threads", integer=True)
    cases = chosen_cases(args.family, args.case)
    with_torch = has_torch()
    if not with_torch:
        print("bench: torch is not installed, so there is no peer; floor and our own times only.", file=sys.stderr)
    rows = []
    turns = args.rounds * sum(len(sides_of(family, with_torch)) for family, _ in cases)
    with tqdm(total=turns, file=sys.stderr, desc="bench", unit="turn") as progress:
        for family, name in cases:
            rows.append(measure_case(family, name, args.rounds, args.threads, with_torch, progress))
    print_json(rows) if args.json else print_table(rows, COLUMNS)
    return 0


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("bench", help="this engine beside eager PyTorch on this CPU", description=__doc__)
    about = "; ".join(f"{family.name}: {family.about}" for family in FAMILIES.values())
    parser.add_argument(
        "--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help=f"what to measure ({about})"
    )
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these cases, for instance XS or causal-1024")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of alternation (default %(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, available_cores()), help="threads for each side")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.set_defaults(run=run)
