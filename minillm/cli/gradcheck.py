"""`minillm gradcheck`: the gradient of every registered function against finite differences in float64."""

import argparse
import difflib
import importlib
import pkgutil
import sys

import numpy as np
from tqdm import tqdm

import minillm.functional
import minillm.fused
from minillm.autograd import registry
from minillm.autograd.gradcheck import check_row
from minillm.checks import require_positive
from minillm.cli.output import print_json, print_table

COLUMNS = ["name", "max_rel_error", "allowed", "passed"]


def import_registered() -> None:
    """Import every module whose functions register themselves."""
    for package in (minillm.functional, minillm.fused):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def chosen_rows(name: str | None) -> list[registry.Row]:
    """The row of that name, or all; an unknown name is answered with those that are close."""
    rows = {row.name: row for row in registry.rows()}
    if name is None:
        return list(rows.values())
    if name not in rows:
        close = difflib.get_close_matches(name, rows, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise LookupError(f"gradcheck: there is no registered function '{name}'.{hint}")
    return [rows[name]]


def check(row: registry.Row, seed: int, draws: int) -> list[dict]:
    """Check every form of one function; a form that cannot even be evaluated has failed."""
    forms = []
    for kind, form in row.forms.items():
        single = registry.Row(row.name, **{kind: form}, example=row.example)
        entry = {"function": row.name, "form": kind}
        try:
            (result,) = check_row(single, np.random.default_rng(seed), draws)
        except Exception as error:  # whatever a broken function raises is its result
            label = row.name if kind == "primitive" else f"{row.name}[{kind}]"
            broken = {"name": label, "max_rel_error": None, "allowed": None, "passed": False}
            forms.append({**broken, **entry, "worst": f"{type(error).__name__}: {error}"})
            continue
        numbers = {"name": result.name, "max_rel_error": result.max_rel_error, "allowed": result.allowed}
        forms.append({**numbers, "passed": result.passed, **entry, "worst": result.worst})
    return forms


def run(args: argparse.Namespace) -> int:
    """Check and report; 1 when a gradient is wrong."""
    require_positive(args.draws, "gradcheck", "--draws", integer=True)
    require_positive(args.seed, "gradcheck", "--seed", integer=True, zero_ok=True)
    import_registered()
    rows = chosen_rows(args.name)
    bar = tqdm(rows, desc="gradient checks", unit="function", leave=False, file=sys.stderr)
    results = [result for row in bar for result in check(row, args.seed, args.draws)]
    failed = [result for result in results if not result["passed"]]
    if args.json:
        print_json(results)
    else:
        print_table(results, COLUMNS)
        print(f"\nForms checked: {len(results)}. Functions: {len(rows)}. Failed: {len(failed)}.")
        for result in failed:
            print(f"{result['name']}: {result['worst']}")
    return 1 if failed else 0


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("gradcheck", help="check gradients", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="one registered function instead of all")
    parser.add_argument("--draws", type=int, default=3, metavar="N", help="random examples of each (default: 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the examples (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.set_defaults(run=run)
