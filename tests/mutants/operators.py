"""Mutations: one small mistake each, made in the text of one expression and nowhere else.

The mistakes are those that people make in derivatives and kernels: a sign, a forgotten term or factor, operands
the wrong way round, a forgotten mask.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

# Calls and keywords whose arguments are messages, shapes or examples and no part of an equation.
SKIPPED_CALLS = {"require", "require_positive", "require_one_of", "message", "range", "reshape", "written", "derived"}
SKIPPED_CALLS |= {"program_id", "num_programs", "static_range", "static_assert", "cdiv", "jit", "autotune"}
SKIPPED_KEYWORDS = {"example", "doc", "shape", "axes", "axis"}
SKIPPED_FUNCTIONS = ("_example", "example_", "check_", "draw_", "_normal", "_positive", "_apart", "_pair", "_with_axis")

TWINS = {"add": "subtract", "subtract": "add", "multiply": "divide", "maximum": "minimum", "minimum": "maximum"}
KEEPS_FIRST = {"negative", "abs", "maximum", "minimum", "clip"}


@dataclass(frozen=True)
class Mutant:
    """One changed expression: where it stands, what it was, what it became."""

    path: str
    function: str
    line: int
    start: int
    stop: int
    original: str
    mutated: str
    mistake: str
    is_statement: bool = False

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies the mutant in the list of equivalent ones: line numbers change, these do not."""
        return self.path, self.function, self.original, self.mutated

    def apply(self, source: str) -> str:
        """The source with the mistake in it; the lines stay where they are."""
        lines = "\n" * (source.count("\n", self.start, self.stop) - self.mutated.count("\n"))
        text = self.mutated + lines if self.is_statement else f"({self.mutated}{lines})"
        return source[: self.start] + text + source[self.stop :]


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every mutant of one file, in order."""
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line.encode()))
    encoded = source.encode()

    def position(line: int, column: int) -> int:
        return len(encoded[: offsets[line - 1] + column].decode())

    found = []
    for function, node, replacement, mistake in _visit(ast.parse(source), "module"):
        start = position(node.lineno, node.col_offset)
        stop = position(node.end_lineno, node.end_col_offset)
        place = (path, function, node.lineno, start, stop, source[start:stop])
        found.append(Mutant(*place, replacement, mistake, isinstance(node, ast.stmt)))
    return found


def _visit(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST, str, str]]:
    """Walk the parts of the tree that compute, and yield every mistake that can be made in each."""
    if isinstance(node, ast.FunctionDef):
        if node.name.startswith(SKIPPED_FUNCTIONS):
            return
        inner = node.name if function == "module" else f"{function}.{node.name}"
        for statement in node.body:
            yield from _visit(statement, inner)
        if node.name == "vjp" or any(_name(d) in ("written", "derived") for d in node.decorator_list):
            yield from _returned(node, inner)
        return
    if isinstance(node, ast.ClassDef):
        for statement in node.body:
            yield from _visit(statement, node.name if function == "module" else f"{function}.{node.name}")
        return
    if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Constant):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield from _visit(node.value, function)
        return
    if isinstance(node, ast.Assign) and function == "module" and not isinstance(node.value, ast.Call):
        return  # constants and tables of names
    if isinstance(node, ast.Assign) and _name(node.value) == "primitive":
        function = ast.unparse(node.targets[0])
    if isinstance(node, ast.Subscript):
        yield from _visit(node.value, function)  # not the index
        return
    yield from ((function, node, text, mistake) for text, mistake in _mistakes(node))
    if isinstance(node, ast.Call):
        name = _name(node)
        if name in SKIPPED_CALLS:
            if name == "reshape" and isinstance(node.func, ast.Attribute):
                yield from _visit(node.func.value, function)
            return
        yield from _visit(node.func, function)
        if name == "primitive":
            for vjp in node.args[2:]:
                yield from _vjp(vjp, function)
            return
        for argument in node.args:
            yield from _visit(argument, function)
        for keyword in node.keywords:
            if keyword.arg not in SKIPPED_KEYWORDS:
                yield from _visit(keyword.value, function)
        return
    for child in ast.iter_child_nodes(node):
        yield from _visit(child, function)


def _vjp(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST, str, str]]:
    """A row of the primitive table: the VJP as a whole with the wrong sign, and mistakes inside it."""
    if isinstance(node, ast.Lambda):
        yield function, node.body, f"-({ast.unparse(node.body)})", "sign of the VJP"
        yield from _visit(node.body, function)


def _returned(function: ast.FunctionDef, name: str) -> Iterator[tuple[str, ast.AST, str, str]]:
    """What a derivative or a loss returns, with the wrong sign; of several results each in turn."""
    own = [n for n in ast.walk(function) if isinstance(n, ast.Return) and n.value is not None]
    inner = [n for f in ast.walk(function) if isinstance(f, ast.FunctionDef) and f is not function for n in ast.walk(f)]
    for statement in own:
        if statement in inner:
            continue
        results = statement.value.elts if isinstance(statement.value, ast.Tuple) else [statement.value]
        for result in results:
            if isinstance(result, ast.Name | ast.Call | ast.BinOp) and not _is_nothing(result):
                yield name, result, f"-({ast.unparse(result)})", "sign of the result"


def _is_nothing(node: ast.AST) -> bool:
    """A result whose sign means nothing: the closure itself, or zeros."""
    return getattr(node, "id", "") == "vjp" or _name(node) in ("zeros", "zeros_like")


def _name(node: ast.AST) -> str:
    """The last part of what is called: `where` for `np.where(...)`."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _text(*parts: ast.AST | str) -> str:
    return "(" + "".join(p if isinstance(p, str) else f"({ast.unparse(p)})" for p in parts) + ")"


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant))


def _is_joining(node: ast.BinOp) -> bool:
    """A sum of tuples, lists or strings."""
    return any(isinstance(side, ast.Tuple | ast.List | ast.JoinedStr) for side in (node.left, node.right)) or any(
        isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right)
    )


def _mistakes(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.BinOp) and not _is_joining(node):
        yield from _in_binary(node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not _is_number(node):
        yield _text(node.operand), "sign"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert | ast.Not):
        yield _text(node.operand), "negation dropped"
    elif isinstance(node, ast.AugAssign):
        target, value = ast.unparse(node.target), ast.unparse(node.value)
        flipped = {ast.Add: "-=", ast.Sub: "+=", ast.Mult: "/=", ast.Div: "*="}.get(type(node.op))
        if flipped:
            yield f"{target} {flipped} ({value})", "sign" if flipped in ("-=", "+=") else "inverse"
            yield "pass", "term dropped"
    elif isinstance(node, ast.Call):
        yield from _in_call(node)


def _in_binary(node: ast.BinOp) -> Iterator[tuple[str, str]]:
    left, right = node.left, node.right
    if isinstance(node.op, ast.Add):
        yield _text(left, " - ", right), "sign"
        yield _text(left), "term dropped"
        if not _is_number(left):
            yield _text(right), "term dropped"
    elif isinstance(node.op, ast.Sub):
        yield _text(left, " + ", right), "sign"
        yield _text(right, " - ", left), "operands swapped"
        yield _text(left), "term dropped"
    elif isinstance(node.op, ast.Mult):
        yield _text(left), "factor dropped"
        yield _text(right), "factor dropped"
    elif isinstance(node.op, ast.Div):
        yield _text(left), "divisor dropped"
        yield _text(right, " / ", left), "operands swapped"
    elif isinstance(node.op, ast.MatMult):
        yield f"-{_text(left, ' @ ', right)}", "sign"
    elif isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield _text(left), "condition dropped"
        yield _text(right), "condition dropped"


def _in_call(node: ast.Call) -> Iterator[tuple[str, str]]:
    name = _name(node)
    if name == "where" and len(node.args) == 3:
        yield _text(node.args[1]), "mask dropped"
        condition, yes, no = map(ast.unparse, node.args)
        yield f"{ast.unparse(node.func)}({condition}, {no}, {yes})", "branches swapped"
    if name in TWINS and len(node.args) >= 2 and isinstance(node.func, ast.Attribute):
        rest = ", ".join([*map(ast.unparse, node.args), *(f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords)])
        yield f"{ast.unparse(node.func.value)}.{TWINS[name]}({rest})", "sign" if "t" in name[:3] else "twin"
    if name in KEEPS_FIRST and node.args and not any(k.arg == "out" for k in node.keywords):
        yield _text(node.args[0]), "call dropped"
    if name == "store" and len(node.args) >= 2:
        rest = [*map(ast.unparse, node.args[2:]), *(f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords)]
        arguments = ", ".join([ast.unparse(node.args[0]), f"-({ast.unparse(node.args[1])})", *rest])
        yield f"{ast.unparse(node.func)}({arguments})", "sign of what is stored"
    for dropped in (k for k in node.keywords if k.arg in ("mask", "other")):
        kept = [f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords if k is not dropped and k.arg != "other"]
        arguments = ", ".join([*map(ast.unparse, node.args), *kept])
        if dropped.arg == "mask":
            yield f"{ast.unparse(node.func)}({arguments})", "mask dropped"
