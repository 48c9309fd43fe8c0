"""Reading the tree as text: ids in docstrings, in test markers and in lessons.

An object implements an id when a line of its docstring begins with ``Equation:`` followed by the id in backticks. A test
holds an id when it, its class or its module carries ``pytest.mark.equation("id", ...)``. A lesson teaches an id when the id
stands in backticks in one of its comment lines.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

EQUATION_LINE = re.compile(r"^\s*Equation:\s*`([^`\s]+)`", re.MULTILINE)
BACKTICKED = re.compile(r"`([a-z0-9][a-z0-9.-]*)`")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Found = dict[str, list[str]]


def scan_code(root: Path, package: str) -> Found:
    """Ids in the docstrings of a package, each with the objects as ``module:qualname``."""
    found: Found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for qualname, docstring in _docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            for id_ in EQUATION_LINE.findall(docstring):
                places = found.setdefault(id_, [])
                place = f"{module}:{qualname}" if qualname else module
                if place not in places:
                    places.append(place)
    return found


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings of a module, its classes and functions, and assignments with a ``doc=``."""
    docstring = ast.get_docstring(tree)
    if docstring:
        yield "", docstring
    yield from _inside(tree.body, "")


def _inside(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, Definition):
            docstring = ast.get_docstring(node)
            if docstring:
                yield prefix + node.name, docstring
            yield from _inside(node.body, prefix + node.name + ".")
        elif (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name)
        ):
            for keyword in node.value.keywords:  # a primitive: its docstring is an argument of the call
                if keyword.arg == "doc" and isinstance(keyword.value, ast.Constant):
                    yield prefix + node.targets[0].id, str(keyword.value.value)


def scan_tests(root: Path) -> Found:
    """Ids in markers below ``tests/``, each with the node ids of the tests that carry it."""
    found: Found = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(root).as_posix()
        for name, ids in _marked(tree.body, where, _module_marks(tree)):
            for id_ in ids:
                found.setdefault(id_, []).append(name)
    return {id_: sorted(set(names)) for id_, names in found.items()}


def _marked(body: list[ast.stmt], where: str, inherited: list[str]) -> Iterator[tuple[str, list[str]]]:
    for node in body:
        if not isinstance(node, Definition):
            continue
        ids = inherited + [id_ for decorator in node.decorator_list for id_ in _mark_ids(decorator)]
        if isinstance(node, ast.ClassDef):
            yield from _marked(node.body, f"{where}::{node.name}", ids)
        elif node.name.startswith("test") and ids:
            yield f"{where}::{node.name}", ids


def _module_marks(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets):
            marks = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
            return [id_ for mark in marks for id_ in _mark_ids(mark)]
    return []


def _mark_ids(node: ast.expr) -> list[str]:
    """The arguments of ``pytest.mark.equation(...)``, or nothing for any other expression."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "equation":
        return [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
    return []


def scan_lessons(root: Path) -> Found:
    """Ids in the comment lines of ``lessons/NN_*.py``, each with the stems of the lessons; any backticked word counts."""
    found: Found = {}
    for path in sorted((root / "lessons").glob("[0-9][0-9]_*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                for id_ in BACKTICKED.findall(line):
                    found.setdefault(id_, [])
                    if path.stem not in found[id_]:
                        found[id_].append(path.stem)
    return found
