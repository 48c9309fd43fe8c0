"""Axes 1 and 2 of a grid stop at 65,535 programs: every launch of every family has one axis, and no kernel asks for another.

The interpreter would take any grid, so a kernel that fails at 65,536 rows on a GPU passes every other test here.
"""

import ast
from pathlib import Path

import pytest

import kernels

ROOT = Path(kernels.__file__).parent
SOURCES = sorted(ROOT.glob("*/*.py"))


def launches(tree: ast.AST) -> list[ast.expr]:
    """The grids of all launches, `kernel[grid](...)` of a function named `..._kernel`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            called = node.func.value
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name.endswith("_kernel"):
                found.append(node.func.slice)
    return found


def further_axes(tree: ast.AST) -> list[int]:
    """Lines that ask for the program's place on any axis but the first."""
    asks = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "program" in ast.unparse(node.func)]
    asks = [node for node in asks if ast.unparse(node.func) in ("tl.program_id", "tl.num_programs")]
    return [node.lineno for node in asks if ast.unparse(node.args[0]) != "0"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_axis(path):
    tree = ast.parse(path.read_text())
    assert all(len(grid.elts) == 1 for grid in launches(tree) if isinstance(grid, ast.Tuple))  # others have a name
    assert further_axes(tree) == []


def test_launches_are_found_and_a_second_axis_is_seen():
    assert sum(len(launches(ast.parse(path.read_text()))) for path in SOURCES) > 30
    (grid,) = launches(ast.parse("code._row_kernel[(rows, heads)](x)"))
    assert isinstance(grid, ast.Tuple) and len(grid.elts) == 2
    assert further_axes(ast.parse("a = tl.program_id(0)\nb = tl.program_id(1)")) == [2]
