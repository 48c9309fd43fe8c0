"""The mutation run: make one small mistake after another and see whether a test notices.

A test that cannot fail proves nothing. Every VJP of the primitive table, every derived form, every function of
minillm/functional and every kernel gets one mistake at a time (`operators.py`), and the quickest checks that
concern it are run (`worker.py`). At least 95 % of the mistakes must be noticed; those that change nothing are
listed, with the reason, in `equivalent.toml`. A whole run writes SCORE.md and SCORE.json.
"""

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutants.operators import Mutant, mutants_of  # noqa: E402

HERE = ROOT / "tests" / "mutants"
WANTED = 0.95
LIMIT_S = 300.0
AREAS = {
    "primitives": ["minillm/autograd/primitives.py", "minillm/autograd/operation.py"],
    "derived forms": ["minillm/fused/*.py"],
    "functions as written": ["minillm/functional/*.py"],
    "kernels": ["kernels/*/kernel.py"],
}


@dataclass
class Verdict:
    """A mutant and what killed it: nothing for a survivor."""

    mutant: Mutant
    area: str
    killed_by: str
    seconds: float


def collect(only: str = "") -> list[tuple[str, Mutant]]:
    """Every mutant of every area, in the order of files and lines."""
    return [
        (area, mutant)
        for area, patterns in AREAS.items()
        for pattern in patterns
        for file in sorted(ROOT.glob(pattern))
        if only in str(file.relative_to(ROOT))
        for mutant in mutants_of(str(file.relative_to(ROOT)), file.read_text())
    ]


def equivalents() -> dict[tuple[str, str, str, str], str]:
    """The mutants that are known to change nothing, with the reason."""
    listed = tomllib.loads((HERE / "equivalent.toml").read_text()).get("mutant", [])
    return {(e["path"], e["function"], e["original"], e["mutated"]): e["reason"] for e in listed}


class Workers:
    """Worker processes that judge tasks side by side."""

    def __init__(self, count: int):
        one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "worker.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **one_thread},
            )
            for _ in range(count)
        ]  # fmt: skip

    def judge(self, tasks: list[dict], progress: tqdm) -> dict[int, dict]:
        """The answers to all tasks, by index."""
        waiting: queue.Queue = queue.Queue()
        for task in tasks:
            waiting.put(task)
        answers: dict[int, dict] = {}

        def serve(process: subprocess.Popen) -> None:
            assert process.stdin and process.stdout
            while True:
                try:
                    task = waiting.get_nowait()
                except queue.Empty:
                    return
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                answers[answer["index"]] = answer
                progress.update()

        threads = [threading.Thread(target=serve, args=(process,)) for process in self.processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    def close(self) -> None:
        """Let the processes end."""
        for process in self.processes:
            if process.stdin:
                process.stdin.close()
            process.wait()


def task_for(index: int, path: str, function: str, source: str, limit_s: float) -> dict:
    """What a worker is told."""
    return {"index": index, "path": path, "function": function, "source": source, "limit_s": limit_s}


def control(workers: Workers, paths: list[str]) -> dict[str, float]:
    """Run the checks of every file without a mistake: they must pass, and their time sets the limit."""
    tasks = [task_for(i, p, "", (ROOT / p).read_text(), LIMIT_S) for i, p in enumerate(paths)]
    with tqdm(total=len(tasks), desc="without mutants", unit="file", file=sys.stderr, leave=False) as bar:
        answers = workers.judge(tasks, bar)
    broken = {p: answers[i]["killed_by"] for i, p in enumerate(paths) if answers[i]["killed_by"]}
    if broken:
        raise RuntimeError(f"mutants: the checks fail without a mutant, so they can tell nothing: {broken}")
    return {p: answers[i]["seconds"] for i, p in enumerate(paths)}


def judge_all(chosen: list[tuple[str, Mutant]], jobs: int) -> list[Verdict]:
    """Every mutant's verdict, in the same order."""
    workers = Workers(jobs)
    try:
        seconds = control(workers, sorted({m.path for _, m in chosen}))
        sources = {path: (ROOT / path).read_text() for path in seconds}
        tasks = [
            task_for(i, m.path, m.function, m.apply(sources[m.path]), 20 + 5 * seconds[m.path])
            for i, (_, m) in enumerate(chosen)
        ]
        with tqdm(total=len(tasks), desc="mutants", unit="mutant", file=sys.stderr) as bar:
            answers = workers.judge(tasks, bar)
    finally:
        workers.close()
    return [Verdict(m, area, answers[i]["killed_by"], answers[i]["seconds"]) for i, (area, m) in enumerate(chosen)]


def score_of(verdicts: list[Verdict], known: dict) -> dict:
    """Counts by area, and the survivors that no reason excuses."""
    areas = {}
    for area in AREAS:
        mine = [v for v in verdicts if v.area == area]
        same = [v for v in mine if not v.killed_by and v.mutant.key in known]
        killed = sum(bool(v.killed_by) for v in mine)
        if mine:
            areas[area] = {"mutants": len(mine), "killed": killed, "equivalent": len(same)}
    survivors = [v for v in verdicts if not v.killed_by and v.mutant.key not in known]
    counted = sum(a["mutants"] - a["equivalent"] for a in areas.values())
    killed = sum(a["killed"] for a in areas.values())
    return {
        "areas": areas,
        "mutants": counted,
        "killed": killed,
        "score": killed / counted if counted else 1.0,
        "mistakes": dict(sorted(Counter(v.mutant.mistake for v in verdicts).items())),
        "survivors": [
            {
                "path": v.mutant.path,
                "line": v.mutant.line,
                "function": v.mutant.function,
                "mistake": v.mutant.mistake,
                "original": v.mutant.original,
                "mutated": v.mutant.mutated,
            }
            for v in survivors
        ],
    }


def survivors_of(score: dict, only: str = "") -> list[tuple[str, Mutant]]:
    """The survivors of an earlier run that still exist."""
    keys = {(s["path"], s["function"], s["original"], s["mutated"]) for s in score["survivors"]}
    return [(area, mutant) for area, mutant in collect(only) if mutant.key in keys]


def updated(score: dict, verdicts: list[Verdict], known: dict) -> dict:
    """An earlier score after its survivors were judged again: some are killed now, some are known to change nothing."""
    judged = {v.mutant.key: v for v in verdicts}
    left = []
    for s in score["survivors"]:
        key = (s["path"], s["function"], s["original"], s["mutated"])
        area = next(a for a, patterns in AREAS.items() if any(Path(s["path"]).match(pattern) for pattern in patterns))
        if key in known:
            score["areas"][area]["equivalent"] += 1
        elif key not in judged:  # the code has changed: what is gone is not counted
            score["areas"][area]["mutants"] -= 1
        elif judged[key].killed_by:
            score["areas"][area]["killed"] += 1
        else:
            left.append(s | {"line": judged[key].mutant.line})
    counted = sum(a["mutants"] - a["equivalent"] for a in score["areas"].values())
    killed = sum(a["killed"] for a in score["areas"].values())
    return score | {"mutants": counted, "killed": killed, "score": killed / counted, "survivors": left}


def as_markdown(score: dict) -> str:
    """The score as a page."""
    lines = [
        "# Mutation score",
        "",
        "Written by `make mutants`: one mistake at a time in every derivative, function and kernel, and whether a test",
        "noticed. Equivalent mutants change nothing that can be observed; `equivalent.toml` gives the reason for each.",
        "",
        "| what | mutants | killed | equivalent | score |",
        "|---|---|---|---|---|",
    ]
    for area, a in score["areas"].items():
        share = a["killed"] / max(a["mutants"] - a["equivalent"], 1)
        lines.append(f"| {area} | {a['mutants']} | {a['killed']} | {a['equivalent']} | {share:.1%} |")
    total = sum(a["mutants"] for a in score["areas"].values())
    same = sum(a["equivalent"] for a in score["areas"].values())
    lines += [f"| **all** | {total} | {score['killed']} | {same} | **{score['score']:.1%}** |", ""]
    lines += ["Mistakes made: " + ", ".join(f"{name} {n}" for name, n in score["mistakes"].items()) + ".", ""]
    lines += ["## Survivors", ""] if score["survivors"] else ["No survivors."]
    for s in score["survivors"]:
        change = f"`{' '.join(s['original'].split())}` to `{' '.join(s['mutated'].split())}`"
        lines.append(f"- {s['path']}, line {s['line']}, `{s['function']}`, {s['mistake']}: {change}")
    return "\n".join(lines).rstrip() + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python tests/mutants/run.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sample", type=int, metavar="N", help="only N mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    parser.add_argument("--only", default="", metavar="PART", help="only files whose path contains PART")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--at-least", type=float, default=WANTED, help=f"the score that passes (default: {WANTED})")
    parser.add_argument(
        "--again", action="store_true", help="judge the survivors of SCORE.json again, update the score"
    )
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument("--json", action="store_true", help="the score as JSON on standard output")
    parser.add_argument("--verbose", action="store_true", help="say for every mutant what killed it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run, report, and return 0 if the score is high enough."""
    args = parse(argv)
    before = json.loads((HERE / "SCORE.json").read_text()) if args.again else None
    chosen = survivors_of(before, args.only) if before else collect(args.only)
    if before:
        chosen = [c for c in chosen if c[1].key not in equivalents()]
    if args.sample is not None and args.sample < len(chosen):
        picked = set(random.Random(args.seed).sample(range(len(chosen)), args.sample))
        chosen = [c for i, c in enumerate(chosen) if i in picked]
    if args.list:
        for _, m in chosen:
            print(f"{m.path}:{m.line}: {m.function}: {m.mistake}: {m.original!r} -> {m.mutated!r}")
        return 0
    verdicts = judge_all(chosen, args.jobs)
    if args.verbose:
        for v in verdicts:
            change = f"{v.mutant.original!r} -> {v.mutant.mutated!r}"
            print(
                f"{v.mutant.path}:{v.mutant.line}: {change}: {v.killed_by or 'SURVIVED'} ({v.seconds:.1f} s)",
                file=sys.stderr,
            )
    score = updated(before, verdicts, equivalents()) if before else score_of(verdicts, equivalents())
    page = as_markdown(score)
    if args.sample is None and not args.only:
        (HERE / "SCORE.md").write_text(page)
        (HERE / "SCORE.json").write_text(json.dumps(score, indent=1) + "\n")
    print(json.dumps(score, indent=1) if args.json else page)
    return 0 if score["score"] >= args.at_least else 1


if __name__ == "__main__":
    sys.exit(main())
