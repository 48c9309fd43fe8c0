"""The frame of the `minillm` command: exit codes, one-line errors, and what goes to which stream."""

import argparse
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import cli
from minillm.checks import MissingPackageError
from minillm.cli.output import plain, print_json, print_table

ROOT = Path(__file__).parents[1]


@pytest.fixture
def one_command(monkeypatch):
    """A function that makes `minillm probe` the only command, running what it is given."""

    def offer(run) -> None:
        def add_parser(subparsers):
            parser = subparsers.add_parser("probe")
            parser.add_argument("--number", type=int, default=0)
            parser.set_defaults(run=run)

        monkeypatch.setattr(cli, "available", lambda: {"probe": "for this test"})
        monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(add_parser=add_parser))

    return offer


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["--nonsense"], ["doctr", "--json"], ["doctor", "--nonsense"]])
def test_wrong_usage_is_2_and_prints_nothing_on_standard_output(argv, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "minillm" in err


def test_a_mistyped_command_gets_a_suggestion(capsys):
    cli.main(["doctr"])
    assert "Did you mean 'doctor'?" in capsys.readouterr().err


def test_help_lists_the_commands_that_exist(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.available())
    assert "doctor" in cli.available()


def test_a_command_without_a_module_is_not_offered(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "imaginary", "has no module")
    assert "imaginary" not in cli.available()
    assert cli.main(["imaginary"]) == 2
    assert "no command 'imaginary'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.available()))
def test_every_command_shows_its_options(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"minillm {name}" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_the_command_s(one_command, code):
    one_command(lambda args: code)
    assert cli.main(["probe"]) == code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("the depth must be positive,\n  got 0."), 2, "the depth must be positive, got 0."),
        (ValueError("probe: --number must be odd, got 0."), 2, "--number must be odd, got 0."),
        (TypeError("wanted text, got 3."), 2, "wanted text, got 3."),
        (KeyError("no function called 'x'"), 2, "no function called 'x'"),
        (IndexError("id 300 out of range"), 2, "id 300 out of range"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "[Errno 2] No such file or directory: 'a.txt'"),
        (MissingPackageError("this needs the package 'torch'"), 2, "this needs the package 'torch'"),
        (FloatingPointError("the loss is NaN at step 3."), 1, "the loss is NaN at step 3."),
        (RuntimeError(), 1, "RuntimeError"),
    ],
)
def test_an_error_is_one_line(one_command, capsys, monkeypatch, error, code, line):
    monkeypatch.delenv("MINILLM_TRACEBACK", raising=False)

    def fail(args):
        raise error

    one_command(fail)
    assert cli.main(["probe"]) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"minillm probe: error: {line}\n")
    monkeypatch.setenv("MINILLM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["probe"])


def test_a_mistake_of_ours_keeps_its_traceback(one_command):
    def fail(args):
        raise AssertionError("cannot be")

    one_command(fail)
    with pytest.raises(AssertionError):
        cli.main(["probe"])


def test_an_interrupt_is_130(one_command, capsys):
    def fail(args):
        raise KeyboardInterrupt

    one_command(fail)
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "minillm probe: interrupted\n"


def test_a_missing_package_at_import_points_to_the_doctor(monkeypatch, capsys):
    def fail(name):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert cli.main(["doctor"]) == 2
    assert "`minillm doctor` says what is missing" in capsys.readouterr().err


def test_python_m_minillm_is_the_command():
    done = subprocess.run([sys.executable, "-m", "minillm", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"minillm {cli.__version__}\n")


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `minillm equations | head`: the reader closes the pipe while rows are still being printed."""
    code = "from minillm import cli; from argparse import Namespace as N; "
    code += "cli.run(N(run=lambda args: [print('row') for _ in range(100_000)] and 0), 'probe')"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "row\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.floats(width=32).map(np.float32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_json_is_valid_whatever_the_values(value):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(json.dumps(plain(value), allow_nan=False), parse_constant=refuse) == plain(value)


def test_json_keeps_numbers_and_drops_what_is_no_number(capsys):
    print_json([{"a": np.float64(0.5), "b": math.nan, "c": np.array([1, 2]), "d": (True, None), "e": Path("x")}])
    assert json.loads(capsys.readouterr().out) == [{"a": 0.5, "b": None, "c": [1, 2], "d": [True, None], "e": "x"}]


def test_a_table_is_aligned(capsys):
    print_table([{"name": "a", "n": 3, "x": 0.123456}, {"name": "long", "n": 12, "x": None}], ["name", "n", "x"])
    assert capsys.readouterr().out.splitlines() == ["name   n       x", "a      3  0.1235", "long  12       -"]


def test_a_table_without_rows_is_its_head(capsys):
    print_table([], ["name", "n"])
    assert capsys.readouterr().out == "name  n\n"


def test_namespace_is_what_commands_get(one_command):
    seen = []
    one_command(lambda args: seen.append(args) or 0)
    cli.main(["probe", "--number", "7"])
    assert isinstance(seen[0], argparse.Namespace)
    assert seen[0].number == 7
