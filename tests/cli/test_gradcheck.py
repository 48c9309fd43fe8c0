"""The command `minillm gradcheck`: what it prints, and its exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from minillm.autograd import registry
from minillm.autograd.operation import Derived
from minillm.cli import main
from tests.forms import all_rows

pytestmark = pytest.mark.equation("gradient-check")


def entries(capsys, *words: str) -> tuple[int, list[dict]]:
    code = main(["gradcheck", *words, "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out) if out else []


def test_one_function_in_all_of_its_forms(capsys):
    code, found = entries(capsys, "rms_norm")
    assert code == 0
    assert [e["name"] for e in found] == ["rms_norm[written]", "rms_norm[derived]"]
    for e in found:
        assert set(e) >= {"name", "max_rel_error", "allowed", "passed"}
        assert e["passed"] is True and 0 <= e["max_rel_error"] <= e["allowed"]


def test_every_registered_function_is_checked_and_passes(capsys):
    code, found = entries(capsys, "--draws", "1")
    assert code == 0 and all(e["passed"] for e in found)
    wanted = {(name, kind) for name, row in all_rows().items() for kind in row.forms}
    assert {(e["function"], e["form"]) for e in found} == wanted


def test_draws_and_seed_change_what_is_checked(capsys):
    default = entries(capsys, "softmax")[1]
    assert entries(capsys, "softmax")[1] == default
    assert entries(capsys, "softmax", "--seed", "5")[1] != default
    assert entries(capsys, "softmax", "--draws", "9")[1] != default


def test_the_table_and_the_closing_line(capsys):
    assert main(["gradcheck", "exp"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["name", "max_rel_error", "allowed", "passed"]
    assert out.splitlines()[-1] == "Forms checked: 1. Functions: 1. Failed: 0."
    assert "gradient checks" in err, "progress goes to standard error"


@pytest.fixture
def broken(monkeypatch):
    """A row whose derived form has a wrong sign, and one that raises, for one test."""

    def example(rng):
        return (rng.normal(size=3),), {}

    wrong = Derived("wrong_sign", lambda x: (x * x, lambda dy: -2 * dy * x))
    row = registry.Row("wrong_sign", written=lambda x: x * x, derived=wrong, example=example)
    monkeypatch.setitem(registry._rows, "wrong_sign", row)

    def fails(x):
        raise ArithmeticError("no idea")

    monkeypatch.setitem(registry._rows, "fails", registry.Row("fails", written=fails, example=example))


def test_a_wrong_gradient_gives_exit_code_1_and_the_json_all_the_same(capsys, broken):
    code, found = entries(capsys, "wrong_sign")
    assert code == 1
    assert [e["passed"] for e in found] == [True, False]
    assert "gradient" in found[1]["worst"] and "finite difference" in found[1]["worst"]
    main(["gradcheck", "wrong_sign"])
    out = capsys.readouterr().out
    assert "Failed: 1." in out and out.splitlines()[-1].startswith("wrong_sign[derived]: ")


def test_a_function_that_raises_has_failed(capsys, broken):
    code, found = entries(capsys, "fails")
    assert code == 1 and found[0]["max_rel_error"] is None and found[0]["worst"] == "ArithmeticError: no idea"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["rms_nrom"], "Did you mean rms_norm"),
        (["zzzzzzzz"], "there is no registered function 'zzzzzzzz'."),
        (["exp", "--draws", "0"], "--draws must be a positive integer, got 0"),
        (["exp", "--seed", "-1"], "--seed must be a non-negative integer, got -1"),
    ],
)
def test_wrong_usage_gives_exit_code_2_and_nothing_on_standard_output(capsys, words, text):
    assert main(["gradcheck", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and text in err and len(err.strip().splitlines()) == 1


def test_as_a_command_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "minillm", "gradcheck", "tanh", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)
    assert entry["name"] == "tanh" and np.isfinite(entry["max_rel_error"])
