"""Imports go down the floors only, have no circles, and need nothing beyond the core but where it is said."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "checks": 0,
    "plotting": 0,
    "equations": 0,
    "autograd": 1,
    "data": 1,
    "functional": 2,
    "optim": 2,
    "fused": 3,
    "nn": 4,
    "models": 5,
    "decoding": 6,
    "training": 7,
    "alignment": 8,
    "cli": 9,
}
CORE = {"numpy", "scipy", "safetensors", "jaxtyping", "tqdm", "matplotlib", "threadpoolctl"}
TORCH_ALLOWED = {"minillm.cli.benchmark.torch_peer", "minillm.training.distributed"}
MAY_IMPORT_LATE = {"kernels.__main__"}  # Triton reads the choice of its interpreter when it is first imported
FAMILY_MAY_IMPORT = {"checks", "autograd", "functional", "optim", "fused"}  # of minillm, in kernels/<family>/


class Import(NamedTuple):
    """One import: by which module, of what, on which line, and whether inside a function."""

    module: str
    target: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}: imports {self.target}"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, is_module) -> Iterator[Import]:
    """Every import of a source text; `from a import b` counts as a.b where that is a module, else as a."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: write imports in full, not relative"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(module, inner if is_module(inner) else node.module or "", node.lineno, in_function)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def read_imports(root: Path = ROOT) -> list[Import]:
    files = [p for package in ("minillm", "kernels") for p in sorted((root / package).rglob("*.py"))]
    names = {module_name(p, root) for p in files}
    return [
        found
        for path in files
        for found in imports_of(path.read_text(encoding="utf-8"), module_name(path, root), names.__contains__)
    ]


def part(name: str) -> str:
    """The part of minillm that a module belongs to: the second word of its name."""
    return (name.split(".") + [""])[1]


def wrong_arrows(imports: list[Import]) -> list[str]:
    """Imports of minillm that do not go down, and of minillm by kernel families that are not references."""
    wrong = []
    for found in imports:
        package, own, other = found.module.split(".")[0], part(found.module), part(found.target)
        if found.target.split(".")[0] == "kernels" and package == "minillm":
            wrong.append(f"{found}: minillm never imports kernels")
        if found.target.split(".")[0] != "minillm" or found.target in ("minillm", "minillm.checks"):
            continue
        if package == "kernels":
            is_family = found.module.count(".") >= 2
            if is_family and other not in FAMILY_MAY_IMPORT:
                wrong.append(f"{found}: a kernel family may import {', '.join(sorted(FAMILY_MAY_IMPORT))} only")
        elif own not in ("", "__main__") and own != other and FLOORS[other] >= FLOORS[own]:
            wrong.append(f"{found}: floor {FLOORS[own]} may not import floor {FLOORS[other]}")
    return wrong


def circles(imports: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other, found as paths that come back."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        graph.setdefault(found.module, set()).add(found.target)
    done: set[str] = set()
    rounds: list[list[str]] = []

    def follow(module: str, path: list[str]) -> None:
        if module in path:
            rounds.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                follow(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        follow(module, [])
    return rounds


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return read_imports()


def test_every_part_has_a_floor():
    parts = {p.stem for p in (ROOT / "minillm").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"__init__", "__main__", "__pycache__"} <= FLOORS.keys()


def test_imports_go_down(imports):
    assert not wrong_arrows(imports), "\n".join(wrong_arrows(imports))


def test_no_circles(imports):
    assert not circles(imports), "\n".join(" -> ".join(circle) for circle in circles(imports))


def test_no_import_inside_a_function(imports):
    inside = [
        f"{found}: import at the top; an optional package through minillm.checks.optional_import"
        for found in imports
        if found.in_function and found.module not in MAY_IMPORT_LATE
    ]
    assert not inside, "\n".join(inside)


def test_minillm_needs_the_core_only(imports):
    allowed = CORE | sys.stdlib_module_names | {"minillm"}
    outside = [
        str(found)
        for found in imports
        if found.module.startswith("minillm")
        and (top := found.target.split(".")[0]) not in allowed
        and not (top == "torch" and found.module in TORCH_ALLOWED)
    ]
    assert not outside, "\n".join(outside)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("minillm.functional.a", "from minillm.nn.layers import Linear", "floor 2 may not import floor 4"),
        ("minillm.data.a", "import minillm.autograd", "floor 1 may not import floor 1"),
        ("minillm.equations.a", "from minillm.cli import main", "floor 0 may not import floor 9"),
        ("minillm.cli.a", "import kernels.norm", "minillm never imports kernels"),
        ("kernels.norm.op", "from minillm.models import Decoder", "a kernel family may import"),
    ],
)
def test_a_wrong_arrow_is_found(module, source, complaint):
    (found,) = wrong_arrows(list(imports_of(source, module, lambda name: False)))
    assert complaint in found


def test_a_circle_is_found():
    there_and_back = [Import("a", "b", 1, False), Import("b", "c", 1, False), Import("c", "a", 1, False)]
    assert circles(there_and_back) == [["a", "b", "c", "a"]]


def test_an_import_inside_a_function_is_found():
    (found,) = imports_of("def f():\n    import json\n", "minillm.checks", lambda name: False)
    assert found.in_function
