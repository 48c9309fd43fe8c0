"""`minillm equations`: the index of formulas, code, kernels, tests and lessons."""

import argparse
import difflib
import sys
from dataclasses import asdict

from minillm.cli.output import print_json, print_table
from minillm.equations import IndexRow, Problem, check, load_catalogue, load_index, missing, write_index


def show_one(row: IndexRow) -> None:
    """Everything about one id."""
    entry = load_catalogue()[row.id]
    how = {"formula": "", "figure": "", "companion": "", "named": " (named there)", "heading": " (a heading there)"}[
        entry.in_source
    ]
    print(f"{row.id}: {row.name}")
    print(f"  {row.latex}")
    print(f"  section  {row.section}, {entry.section_title}")
    print(f"  source   {row.source}{how}")
    if entry.errata:
        print(f"  errata   {', '.join(map(str, entry.errata))}: the formula above is the corrected one")
    for name in ("code", "kernel", "tests", "lessons"):
        places = getattr(row, name)
        for i, place in enumerate(places or ["none yet"]):
            print(f"  {name if i == 0 else '':<8} {place}")


def show_sections(rows: list[IndexRow]) -> None:
    """How much of every section there is."""
    titles = {entry.section: entry.section_title for entry in load_catalogue().values()}
    table = []
    for section, title in sorted(titles.items()):
        inside = [row for row in rows if row.section == section]
        done = sum(row.complete for row in inside)
        table.append({"section": section, "title": title, "complete": f"{done} of {len(inside)}"})
    print_table(table, ["section", "title", "complete"])
    print(f"\n{sum(row.complete for row in rows)} of {len(rows)} ids have code and a test (worked numbers: a test).")
    print("One id in full: minillm equations ID. What is missing: minillm equations --missing --section N.")


#: Names that stand for two things in the documents, and what each of them is called here.
TWO_MEANINGS = {
    "mla": "the name means two things: `perceiver-latent-attention`, where a few learnt queries read a long text, and "
    "`mla-deepseek`, where keys and values are made from one narrow latent a token, for a narrow cache",
    "dca": "the name means two things: `dca-dual-chunk`, of positions within and between chunks, and "
    "`dca-dual-cross-attention`, of channels and of places",
}


def select(rows: list[IndexRow], args: argparse.Namespace) -> list[IndexRow]:
    """The rows that the arguments ask for."""
    if args.id is not None:
        if args.id in TWO_MEANINGS:
            raise ValueError(f"no equation '{args.id}': {TWO_MEANINGS[args.id]}.")
        chosen = [row for row in rows if row.id == args.id]
        if not chosen:
            close = difflib.get_close_matches(args.id, [row.id for row in rows], n=4, cutoff=0.5)
            raise ValueError(f"no equation '{args.id}'." + (f" Close: {', '.join(close)}." if close else ""))
        return chosen
    if args.section is not None:
        rows = [row for row in rows if row.section == args.section]
        if not rows:
            raise ValueError(f"no section {args.section}; `minillm equations` lists them.")
    return [row for row in rows if not row.complete] if args.missing else rows


def sections(text: str) -> list[int]:
    """Parse ``1,2,3``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"sections as in 1,2,3 are wanted, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Show, check or store the index."""
    rows, strangers = load_index()
    chosen = select(rows, args)
    problems: list[Problem] = []
    if args.check:
        problems += check(rows, strangers)
    if args.complete:
        problems += missing(rows, args.complete)
    if args.write:
        print(write_index(rows), file=sys.stderr)
    if args.json:
        print_json([asdict(row) for row in chosen])
    elif args.id is not None:
        show_one(chosen[0])
    elif args.section is not None or args.missing:
        table = [
            {
                "id": r.id,
                "name": r.name,
                "code": len(r.code),
                "kernel": len(r.kernel),
                "tests": len(r.tests),
                "lessons": len(r.lessons),
            }
            for r in chosen
        ]
        print_table(table, ["id", "name", "code", "kernel", "tests", "lessons"])
    elif not (args.check or args.complete or args.write):
        show_sections(rows)
    for problem in problems:
        print(f"equations: {problem.id} {problem.text}", file=sys.stderr)
    if (args.check or args.complete) and not problems and not args.json:
        print("equations: nothing to object to")
    return 1 if problems else 0


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "equations", help="the index: formula, code, kernel, tests, lessons", description=__doc__
    )
    parser.add_argument("id", nargs="?", help="show one id in full")
    parser.add_argument("--section", type=int, metavar="N", help="list one section")
    parser.add_argument("--missing", action="store_true", help="list what lacks code or a test")
    parser.add_argument(
        "--check", action="store_true", help="fail on code without test, test without code, unknown ids"
    )
    parser.add_argument(
        "--complete", type=sections, metavar="1,2", help="fail on ids of these sections that are missing"
    )
    parser.add_argument("--write", action="store_true", help="store the index in the package (a test holds it fresh)")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.set_defaults(run=run)
