"""The command `python -m kernels`: compare, compile and bench the kernel families, train a transformer on them.

Exit codes: 0 fine, 1 a check failed, 2 wrong usage. With --json one array on standard output, nothing else
there; progress and remarks go to standard error.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

import kernels
from minillm.checks import MissingPackageError, optional_import


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description="The Triton kernels: check, compile, time.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare | compile | bench | train")

    compare = commands.add_parser("compare", help="hold a kernel against its NumPy reference")
    compare.add_argument("--impl", metavar="FILE.py:NAME", help="your own function instead of ours; the file is run")
    compare.add_argument("--seed", type=int, help="where the search starts (default: drawn, and printed)")
    compare.add_argument("--examples", type=_positive, default=20, help="problems a property (default 20)")
    compare.add_argument("--figure", metavar="PATH", help="where the picture of the worst case goes")
    compare.add_argument("--no-figure", action="store_true", help="draw nothing")

    compile_ = commands.add_parser("compile", help="compile for GPUs that need not be here, and read the result")
    compile_.add_argument("--target", action="append", help="sm_80, sm_90, sm_100 or gfx942 (default: all)")

    compile_.add_argument("--thorough", action="store_true", help="every configuration that is shipped")

    bench = commands.add_parser("bench", help="time on a GPU beside torch, torch.compile and Liger")
    bench.add_argument(
        "--out", metavar="PATH", help="one file for all results (default: one a family, in kernels/results/)"
    )
    bench.add_argument("--seconds", type=_positive, help="how long all families together may take (default 480)")
    bench.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    bench.add_argument("--sweep", action="store_true", help="time other tile sizes instead, to choose better ones")

    commands.add_parser("train", help="what `minillm train` does, on the kernels; has its options", add_help=False)

    for command in (compare, compile_, bench):
        command.add_argument("family", nargs="?", help="one family (default: all)")
        command.add_argument("--json", action="store_true", help="one JSON array on standard output")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a positive number is wanted, got {text}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not getattr(kernels, "MINILLM_KERNELS", False):
        return _fail(
            f"another package called 'kernels' ({kernels.__file__}) shadows the one of minillm. "
            "Install minillm in an environment of its own: `make test` makes one."
        )
    if arguments[:1] == ["train"]:
        return _train(arguments)
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)

    from kernels import registry

    if options.family is not None and options.family not in registry.FAMILIES:
        return _fail(f"there is no family {options.family!r}; there is {', '.join(registry.FAMILIES)}.")
    families = registry.FAMILIES if options.family is None else (options.family,)
    try:
        optional_import("torch", "kernels")
        return {"compare": _compare, "compile": _compile, "bench": _bench}[options.command](
            options, families, arguments
        )
    except MissingPackageError as error:
        return _fail(str(error))


def _compare(options: argparse.Namespace, families: Sequence[str], arguments: Sequence[str]) -> int:
    from kernels import mode

    if not mode.has_gpu():
        code = mode.settle(True, arguments)
        if code is not None:
            return code
    optional_import("triton", "kernels")
    optional_import("hypothesis", "kernels")
    from kernels import compare, figure
    from kernels.subject import UsageError

    if options.seed is None:
        options.seed = 0 if os.environ.get("CI") else int.from_bytes(os.urandom(2), "big")
    if options.impl and options.family is None:
        return _fail("--impl: say which family the function belongs to, as in `compare norm --impl FILE.py:NAME`.")
    outcomes = []
    for family in families:
        try:
            subject = compare.reader_subject(family, options.impl) if options.impl else compare.our_subject(family)
        except UsageError as error:
            return _fail(str(error))
        _say(f"{family}: {', '.join(subject.functions)} on {subject.backend}, seed {options.seed}")
        if not subject.differentiable:
            _say("no gradient flows through this function: its values are checked, its gradient is not")
        found = compare.compare(family, subject, examples=options.examples, number=options.seed, progress=True)
        outcomes += found
        if not options.no_figure:
            path = options.figure or f"figures/kernels_{family}_error{'_impl' if options.impl else ''}.png"
            _say(figure.draw(family, subject, found, path))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if options.json:
        print(json.dumps([outcome.row() for outcome in outcomes], indent=1))
        if failed:
            _say(compare.report(failed))
    else:
        print(compare.report(outcomes))
    _say(f"{len(outcomes) - len(failed)} of {len(outcomes)} checks passed (seed {options.seed})")
    return 1 if failed else 0


def _compile(options: argparse.Namespace, families: Sequence[str], arguments: Sequence[str]) -> int:
    from kernels import mode

    code = mode.settle(False, arguments)
    if code is not None:
        return code
    optional_import("triton", "kernels")
    from kernels import aot, inspection

    unknown = sorted(set(options.target or ()) - set(aot.TARGETS))
    if unknown:
        return _fail(f"--target: one of {', '.join(aot.TARGETS)} is wanted, got {', '.join(unknown)}.")
    rows = []
    for family in families:
        rows += inspection.inspect(family, options.target or list(aot.TARGETS), options.thorough, progress=True)
    print(json.dumps(rows, indent=1) if options.json else inspection.report(rows))
    failed = [row for row in rows if not row["ok"]]
    for row in failed:
        _say(f"{row['kernel']} {row['config']} {row['target']}: {'; '.join(row['problems'])}")
    for remark in dict.fromkeys(f"{row['kernel']} on {row['target']}: {r}" for row in rows for r in row["remarks"]):
        _say(f"to know: {remark}")
    _say(f"{len(rows) - len(failed)} of {len(rows)} builds are as expected (ptxas {aot.assembler_version()})")
    return 1 if failed else 0


def _bench(options: argparse.Namespace, families: Sequence[str], arguments: Sequence[str]) -> int:
    from kernels import mode

    if not mode.has_gpu():
        _say("no GPU: not measured")
        if options.json:
            print("[]")
        return 0
    code = mode.settle(False, arguments)
    if code is not None:
        return code
    optional_import("triton", "kernels")
    from kernels import bench

    if options.sweep:
        rows, faults = [row for family in families for row in bench.sweep(family, _say)], []
    else:
        rows, faults = bench.bench(families, options.quick, options.out, options.seconds or bench.SECONDS, _say)
    print(json.dumps(rows, indent=1) if options.json else bench.report(rows))
    for fault in faults:
        _say(fault)
    return 1 if faults else 0


def _train(arguments: Sequence[str]) -> int:
    from kernels import mode

    try:
        optional_import("torch", "kernels")
        if not mode.has_gpu():
            code = mode.settle(True, arguments)
            if code is not None:
                return code
        optional_import("triton", "kernels")
    except MissingPackageError as error:
        return _fail(str(error))
    from kernels import train

    parser = argparse.ArgumentParser(prog="python -m kernels")
    train.add_parser(parser.add_subparsers(required=True))
    try:
        return train.run(parser.parse_args(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    except (ValueError, FileNotFoundError) as error:
        return _fail(str(error))


def _say(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


def _fail(text: str) -> int:
    _say(f"python -m kernels: {text}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
