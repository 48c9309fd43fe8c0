"""The mutation run itself: its mistakes are mistakes, its files are left alone, and a sample of it is noticed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forms import all_rows
from tests.mutants import run
from tests.mutants.operators import mutants_of
from tests.mutants.worker import MutantFinder, files_for, module_name
from tests.strategies import examples

SOURCE = '''"""Sums: a + b."""
LIMIT = 1 + 2


def _example(rng):
    return (rng.normal() + 1,), {}


@written("f", example=_example)
def f(x, y, mask):
    """x + y"""
    require(x.ndim + 1 > 0, "f", "x", "a + b", x)
    total = where(mask, x * y, 0.0) - x[len(x) - 1]
    total += (
        -y
        / x
    )
    return total


square = primitive("square", np.square, lambda g, out, x: 2 * g * x, example=lambda rng: rng.normal() + 1)
'''


def changes(source: str) -> set[tuple[str, str, str]]:
    return {(m.function, m.original, m.mutated) for m in mutants_of("f.py", source)}


def test_mistakes_are_made_in_equations_and_nowhere_else():
    product = "where(mask, x * y, 0.0)"
    assert changes(SOURCE) == {
        ("f", product, "((x * y))"),
        ("f", product, "where(mask, 0.0, x * y)"),
        ("f", "x * y", "((x))"),
        ("f", "x * y", "((y))"),
        ("f", f"{product} - x[len(x) - 1]", f"(({product}) + (x[len(x) - 1]))"),
        ("f", f"{product} - x[len(x) - 1]", f"((x[len(x) - 1]) - ({product}))"),
        ("f", f"{product} - x[len(x) - 1]", f"(({product}))"),
        ("f", "total += (\n        -y\n        / x\n    )", "total -= (-y / x)"),
        ("f", "total += (\n        -y\n        / x\n    )", "pass"),
        ("f", "-y\n        / x", "((-y))"),
        ("f", "-y\n        / x", "((x) / (-y))"),
        ("f", "-y", "((y))"),
        ("f", "total", "-(total)"),
        ("square", "2 * g * x", "-(2 * g * x)"),
        ("square", "2 * g * x", "((2 * g))"),
        ("square", "2 * g * x", "((x))"),
        ("square", "2 * g", "((2))"),
        ("square", "2 * g", "((g))"),
    }


KERNEL = """def kernel(X, mask, rows):
    x = tl.load(X + rows, mask=mask, other=0.0)
    x = tl.where(mask, x, 0.0)
    tl.store(X, x, mask=mask)
"""


def test_a_kernel_loses_its_masks_and_what_it_stores_its_sign():
    found = changes(KERNEL)
    assert ("kernel", "tl.load(X + rows, mask=mask, other=0.0)", "tl.load(X + rows)") in found
    assert ("kernel", "tl.where(mask, x, 0.0)", "((x))") in found
    assert ("kernel", "tl.store(X, x, mask=mask)", "tl.store(X, x)") in found
    assert ("kernel", "tl.store(X, x, mask=mask)", "tl.store(X, -(x), mask=mask)") in found


@pytest.fixture(scope="module")
def every():
    """All mutants of the package and the kernels, with their areas."""
    return run.collect()


@pytest.mark.parametrize("area", run.AREAS)
def test_a_mutant_is_a_program_that_differs_and_keeps_its_lines(area, every):
    mutants = [m for a, m in every if a == area]
    assert mutants, "an area without mutants would count as perfect"
    for m in mutants[:: examples(40, 4)]:
        source = (run.ROOT / m.path).read_text()
        changed = m.apply(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), m
        assert changed.count("\n") == source.count("\n"), m
        assert source[m.start : m.stop] == m.original


def test_every_vjp_and_every_derived_form_is_mutated(every):
    functions = {m.function.partition(".")[0] for _, m in every}
    for name, row in all_rows().items():
        if row.primitive is not None:
            assert name in functions, name
        elif row.derived is not None:
            assert row.derived.__name__ in functions, name


def test_an_equivalent_mutant_has_a_reason_and_still_exists(every):
    existing = {m.key for _, m in every}
    for key, reason in run.equivalents().items():
        assert len(reason) > 20, key
        assert key in existing, f"{key} is no mutant any more: delete it from equivalent.toml"


def test_the_hook_serves_the_mutant_for_its_module_only(tmp_path):
    file = tmp_path / "mutant.py"
    file.write_text("x = 1\n")
    finder = MutantFinder("minillm.fused.norms", file)
    assert finder.find_spec("minillm.fused.softmax") is None
    found = finder.find_spec("minillm.fused.norms")
    assert found is not None and found.origin == str(file)
    assert module_name("minillm/fused/norms.py") == "minillm.fused.norms"


def test_the_files_that_concern_a_module_are_found():
    assert "tests/functional/test_norms.py" in files_for("minillm/fused/norms.py")[:3]
    assert "tests/functional/test_policy_losses.py" in files_for("minillm/functional/frozen.py")  # through its users
    assert "tests/autograd/test_primitives.py" in files_for("minillm/autograd/primitives.py")


def test_the_score_counts_survivors_and_forgives_equivalents(monkeypatch):
    mutants = mutants_of("minillm/fused/f.py", SOURCE)[:4]
    verdicts = [run.Verdict(m, "derived forms", killed, 1.0) for m, killed in zip(mutants, ["a", "b", "", ""])]
    score = run.score_of(verdicts, {mutants[2].key: "no difference"})
    assert (score["mutants"], score["killed"]) == (3, 2) and score["score"] == pytest.approx(2 / 3)
    assert [s["line"] for s in score["survivors"]] == [mutants[3].line]
    page = run.as_markdown(score)
    assert "| derived forms | 4 | 2 | 1 | 66.7% |" in page and "## Survivors" in page


def test_the_list_needs_no_run(capsys):
    assert run.main(["--list", "--only", "fused/norms", "--sample", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.slow
def test_a_sample_of_mutants_is_noticed_and_the_tree_is_left_alone():
    watched = {f: f.read_bytes() for f in (run.ROOT / "minillm").rglob("*.py")}
    command = [sys.executable, str(Path(run.__file__)), "--sample", "24", "--only", "minillm/", "--json"]
    done = subprocess.run([*command, "--at-least", "0.8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    score = json.loads(done.stdout)
    assert score["mutants"] >= 20 and score["killed"] >= 0.8 * score["mutants"]
    assert {f: f.read_bytes() for f in watched} == watched


@pytest.mark.slow
def test_a_mutant_that_nothing_notices_turns_the_run_red():
    command = [
        sys.executable,
        str(Path(run.__file__)),
        "--only",
        "fused/positions",
        "--sample",
        "2",
        "--at-least",
        "1.01",
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
