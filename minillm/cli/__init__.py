"""The `minillm` command: one module a subcommand, imported only when it is the one asked for.

Exit codes: 0 fine, 1 a check failed or the work could not be finished, 2 wrong usage (nothing on standard
output). Results go to standard output, progress and errors to standard error.
"""

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

from minillm import __version__
from minillm.checks import MissingPackageError

# A module `minillm.cli.<name>` offers `add_parser(subparsers)`, which sets `run=` to a function from the parsed
# arguments to an exit code. The summaries stand here so that help needs no module; a name whose module does not
# exist is not offered.
COMMANDS = {
    "tour": "the whole idea in five minutes: gradients, a transformer, a reward, a kernel, the figures",
    "train": "train a transformer on text, on a folder or on a synthetic language",
    "generate": "continue a text with a trained model",
    "chat": "talk to a pretrained model",
    "sft": "supervised training on demonstrations of an arithmetic task",
    "grpo": "improve a trained policy by a verifiable reward alone",
    "gradcheck": "check the gradient of every registered function",
    "bench": "training, attention, decoding and experts beside eager PyTorch on this CPU",
    "equations": "the index: where each equation is written, tested and taught",
    "lessons": "list, run, build and grade the lessons",
    "figures": "draw every figure again",
    "doctor": "what is installed, what is missing and what that switches off",
}

WRONG_USAGE = (ValueError, TypeError, LookupError, OSError, MissingPackageError)
FAILURE = (RuntimeError, ArithmeticError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    try:
        parser = build_parser(name)
        if not argv:
            parser.print_help(sys.stderr)
            return 2
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed help, version or what is wrong
        return int(stop.code or 0)
    except ModuleNotFoundError as error:
        if (error.name or "minillm").partition(".")[0] in ("minillm", "kernels"):
            raise
        print(f"minillm {name}: error: {error}. `minillm doctor` says what is missing.", file=sys.stderr)
        return 2
    return run(args, name or "")


def run(args: argparse.Namespace, name: str) -> int:
    """Run a parsed subcommand; its errors become one line on standard error unless MINILLM_TRACEBACK is set."""
    try:
        code = args.run(args)
        sys.stdout.flush()
        return int(code or 0)
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if hasattr(args, "resume") else ""
        print(f"minillm {name}: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (*WRONG_USAGE, *FAILURE) as error:
        if os.environ.get("MINILLM_TRACEBACK", "") not in ("", "0"):
            raise
        print(f"minillm {name}: error: {one_line(error).removeprefix(f'{name}: ')}", file=sys.stderr)
        return 2 if isinstance(error, WRONG_USAGE) else 1


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its kind where it has no message."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__


def available() -> dict[str, str]:
    """The subcommands whose module exists, with their summaries."""
    return {name: text for name, text in COMMANDS.items() if importlib.util.find_spec(f"minillm.cli.{name}")}


def build_parser(name: str | None) -> argparse.ArgumentParser:
    """The parser of the command line with the one subcommand ``name``; the others appear in its help only."""
    offered = available()
    width = max(map(len, offered), default=0)
    parser = argparse.ArgumentParser(
        prog="minillm",
        description="Language models built and aligned from scratch, every equation written, derived and checked.",
        usage="minillm [--help] [--version] COMMAND ...",
        epilog="commands:\n"
        + "\n".join(f"  {command:<{width}}  {text}" for command, text in offered.items())
        + "\n\n`minillm COMMAND --help` shows the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minillm {__version__}")
    if name in offered:
        subparsers = parser.add_subparsers(prog="minillm", metavar="COMMAND", help=argparse.SUPPRESS)
        importlib.import_module(f"minillm.cli.{name}").add_parser(subparsers)
    elif name is not None:
        close = difflib.get_close_matches(name, offered, n=1)
        parser.error(
            f"there is no command '{name}'."
            + (f" Did you mean '{close[0]}'?" if close else "")
            + " `minillm --help` lists the commands."
        )
    return parser
