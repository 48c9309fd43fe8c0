"""`minillm lessons`: list, run, build, hand out and grade the course."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from minillm.checks import optional_import
from minillm.cli import lessonbook
from minillm.cli.output import print_json, print_table


def _title(source: Path) -> str:
    for line in source.read_text(encoding="utf-8").splitlines():
        if line.startswith("# # "):
            return line[4:].strip()
    return source.stem


def list_lessons(args: argparse.Namespace) -> int:
    """Print number and title of every lesson."""
    rows = [{"lesson": p.stem, "title": _title(p)} for p in lessonbook.find_sources(args.folder, args.names)]
    print_json(rows) if args.json else print_table(rows, ["lesson", "title"])
    return 0


def execute_lessons(args: argparse.Namespace) -> int:
    """Run lessons and compare with (``run``), or store (``build``), their notebooks."""
    step = lessonbook.run_and_compare if args.action == "run" else lessonbook.build
    outcomes = []
    for source in tqdm(lessonbook.find_sources(args.folder, args.names), desc="lessons", file=sys.stderr):
        reason = lessonbook.lacking(source)
        if reason is not None:
            print(f"lessons: {source.stem}: {reason}.", file=sys.stderr)
            continue
        try:
            outcomes.append(step(source))
        except lessonbook.LessonError as error:
            outcomes.append(lessonbook.Outcome(source.stem, 0.0, [str(error)]))
    for outcome in outcomes:
        for problem in outcome.problems:
            print(f"lessons: {outcome.lesson}: {problem}", file=sys.stderr)
    rows = [{"lesson": o.lesson, "seconds": round(o.seconds, 1), "passed": o.passed} for o in outcomes]
    print_json(rows) if args.json else print_table(rows, ["lesson", "seconds", "passed"])
    return 0 if all(o.passed for o in outcomes) else 1


def hand_out(args: argparse.Namespace) -> int:
    """Write the students' copies, and the helper files they need, into a folder."""
    nbformat = optional_import("nbformat", "lessons")
    args.out.mkdir(parents=True, exist_ok=True)
    for source in lessonbook.find_sources(args.folder, args.names):
        target = args.out / f"{source.stem}.ipynb"
        if target.exists() and not args.force:
            raise ValueError(
                f"lessons: {target} exists, maybe with a student's work in it. Pass --force to replace it."
            )
        target.write_text(nbformat.writes(lessonbook.student_copy(source)) + "\n", encoding="utf-8")
        print(target)
    return 0


def grade_copies(args: argparse.Namespace) -> int:
    """Run students' notebooks and print which exercises pass."""
    if not args.names:
        raise ValueError("lessons: grade needs the notebooks to grade, got none.")
    rows = []
    for name in args.names:
        if not Path(name).is_file():
            raise FileNotFoundError(f"lessons: no notebook at {name}.")
        (source,) = lessonbook.find_sources(args.folder, [Path(name).stem])
        for title, passed, why in lessonbook.grade(Path(name), source, args.folder):
            rows.append({"notebook": name, "exercise": title, "passed": passed, "why": why})
    print_json(rows) if args.json else print_table(rows, ["notebook", "exercise", "passed", "why"])
    return 0 if rows and all(row["passed"] for row in rows) else 1


ACTIONS = {
    "list": list_lessons,
    "run": execute_lessons,
    "build": execute_lessons,
    "student": hand_out,
    "grade": grade_copies,
}


def run(args: argparse.Namespace) -> int:
    """Do the chosen action."""
    return ACTIONS[args.action](args)


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("lessons", help="list, run, hand out and grade the course", description=__doc__)
    parser.add_argument("action", choices=list(ACTIONS), nargs="?", default="list")
    parser.add_argument("names", nargs="*", help="lessons by number or name (grade: notebook files); all without")
    parser.add_argument("--folder", type=Path, default=Path("lessons"), help="where the lessons are")
    parser.add_argument("--out", type=Path, default=Path("student"), help="where `student` writes its copies")
    parser.add_argument("--force", action="store_true", help="let `student` replace copies that exist")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.set_defaults(run=run)
