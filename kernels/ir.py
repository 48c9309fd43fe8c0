"""Reading Triton's intermediate language: which operations a kernel is made of. Pure functions on text, no tools.

The text (TTIR) is what Triton makes of the Python source before it knows a machine: one operation a line,
`%name = dialect.operation %operand, ... : type`, loops as nested braces.
"""

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

BITS = {"f64": 64, "f32": 32, "f16": 16, "bf16": 16, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i1": 8}
_LOCATION = re.compile(r"\s*loc\([^\n]*$")
_DEFINITION = re.compile(r"(%[\w:, %]+?) = (.*)")
_NAME = re.compile(r"%\w+")
_SHAPED = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)")
_CARRIED = re.compile(r"(%\w+) = (%\w+)")  # in a loop's line: the name inside, and what it is at first
_LOOPS = ("scf.for", "scf.while")


@dataclass(frozen=True)
class Operation:
    """One line of the text: what it defines, from what, and the loop around it (0: none)."""

    name: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    text: str
    loop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the last tensor that the line names, which is the result's; () for a scalar."""
        found = _SHAPED.findall(self.text)
        return _sizes(found[-1][0]) if found else ()


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x") if size)


@functools.lru_cache(maxsize=8)
def operations(ttir: str) -> tuple[Operation, ...]:
    """Every operation in order. A `yield` defines what goes round: the loop's results and the names inside it."""
    found = []
    around: list[tuple[int, tuple[str, ...]]] = [(0, ())]  # the loop, and what a yield in these braces defines
    loops = 0
    for line in ttir.splitlines():
        text = _LOCATION.sub("", line).strip()
        if text.startswith("}") and len(around) > 1:
            around.pop()
        definition = _DEFINITION.match(text)
        results = tuple(_NAME.findall(definition.group(1))) if definition else ()
        body = definition.group(2) if definition else text
        name = body.split(" ", 1)[0].split("(", 1)[0].strip('"')
        here, yielded = around[-1]
        if definition or name in ("scf.yield", "tt.store", "tt.descriptor_store"):
            defines = yielded if name == "scf.yield" else results
            found.append(Operation(name, defines, tuple(_NAME.findall(body)), body, here))
        if name in _LOOPS:
            loops += 1
            results += tuple(inside for inside, _ in _CARRIED.findall(body))
        if text.endswith("{"):
            around.append((loops if name in _LOOPS else here, results or yielded))
    return tuple(found)


# ---- matrix products


@dataclass(frozen=True)
class Dot:
    """A matrix product (m, k) x (k, n) of one program, the type of its factors, and the loop it stands in."""

    m: int
    n: int
    k: int
    dtype: str
    precision: str
    loop: int
    batched: bool = False

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each of m n k."""
        return 2 * self.m * self.n * self.k


def dots(ttir: str) -> list[Dot]:
    """The matrix products as the source wrote them; a batch of them counts as that many rows."""
    found = []
    for operation in operations(ttir):
        if operation.name == "tt.dot":
            (left, dtype), (right, _), *_ = _SHAPED.findall(operation.text)
            *batch, m, k = _sizes(left)
            precision = re.search(r"inputPrecision = (\w+)", operation.text)
            stated = precision.group(1) if precision else "ieee"
            rows = math.prod(batch) * m
            found.append(Dot(rows, _sizes(right)[-1], k, dtype, stated, operation.loop, bool(batch)))
    return found


def intensity(ttir: str) -> float:
    """Operations of matrix products for each byte loaded, in the loop that does most of them; 0 without such a loop.

    What is loaded may come from the cache: this is the number to hold against the cache's rate, and the number
    of programs that share what they load stands between it and the memory's.
    """
    work: dict[int, int] = {}
    for dot in dots(ttir):
        work[dot.loop] = work.get(dot.loop, 0) + dot.flops
    work.pop(0, None)
    if not work:
        return 0.0
    busiest = max(work, key=lambda loop: work[loop])
    loaded = 0
    for operation in operations(ttir):
        if operation.loop == busiest and operation.name in ("tt.load", "tt.descriptor_load"):
            shaped = _SHAPED.findall(operation.text)
            if shaped:
                sizes, dtype = shaped[-1]
                loaded += math.prod(_sizes(sizes)) * BITS.get(dtype, 8) // 8
    return work[busiest] / loaded if loaded else math.inf


def slow_in_dot_loops(ttir: str) -> list[str]:
    """Logarithms, roots and divisions of whole tiles in the innermost loops that hold matrix products.

    A division belongs to an exponential that is there to make a sigmoid or a hyperbolic tangent (a soft cap):
    every exponential of a tile beyond the first takes one along. Three divisions are one pass over something else
    than the products and are let through: of what was just loaded, of what is stored in the same round, and of a
    whole tile by one number.
    """
    busy = {dot.loop for dot in dots(ttir)} - {0}
    casts = ("arith.extf", "arith.truncf", "arith.select")
    loaded: set[str] = set()
    single: set[str] = set()
    for o in operations(ttir):
        if o.name in ("tt.load", "tt.descriptor_load") or (o.name in casts and loaded.intersection(o.operands)):
            loaded.update(o.results)
        if o.name == "tt.splat":
            single.update(o.results)
    stored: set[str] = set()
    for o in reversed(operations(ttir)):
        if o.name in ("tt.store", "tt.descriptor_store") or (o.name in casts and stored.intersection(o.results)):
            stored.update(o.operands)
    inside = [o for o in operations(ttir) if o.loop in busy and len(o.shape) > 1]
    names = [o.name for o in inside]
    divisions = sum(
        o.name == "arith.divf"
        and o.operands[0] not in loaded
        and o.operands[1] not in single
        and not stored.intersection(o.results)
        for o in inside
    )
    free = max(sum(name in ("math.exp", "math.exp2") for name in names) - 1, 0)
    slow = [name for name in names if name in ("math.log", "math.log2", "math.sqrt")]
    return slow + ["arith.divf"] * max(divisions - free, 0)


def exponentials(ttir: str) -> list[tuple[int, ...]]:
    """The shapes of all exponentials; the error function is computed with one."""
    return [o.shape for o in operations(ttir) if o.name in ("math.exp", "math.exp2", "math.erf")]


# ---- types and addresses


def doubles(ttir: str) -> int:
    """Operations on 64-bit floats: a Python float that found its way into arithmetic."""
    return sum(bool(re.search(r"\bf64\b|xf64\b", operation.text)) for operation in operations(ttir))


_KEEPS = ("arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.extui", "arith.select", "tt.splat",
          "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.addptr", "scf.for", "scf.yield")  # fmt: skip
_SHORT = re.compile(r"(?:: tensor<[\dx]*xi32>|: i32|xi32>|, i32)$")


def _reached(seeds: Iterable[str], ttir: str, skip: Iterable[str] = ()) -> set[str]:
    """Everything that values flow into as a part of a sum or product, round loops too."""
    reached = set(seeds)
    steps = [o for o in operations(ttir) if o.name in _KEEPS and o.name not in skip]
    before = -1
    while len(reached) != before:
        before = len(reached)
        for operation in steps:
            if operation.name == "scf.for":
                reached.update(inside for inside, first in _CARRIED.findall(operation.text) if first in reached)
            elif reached.intersection(operation.operands):
                reached.update(operation.results)
    return reached


def _products(ttir: str) -> list[Operation]:
    """The 32-bit products with a factor that is neither a constant nor a range within a tile."""
    known = _constants(ttir)
    return [
        o
        for o in operations(ttir)
        if o.name == "arith.muli" and _SHORT.search(o.text) and not known.issuperset(o.operands[:2])
    ]


def _arguments(ttir: str) -> set[str]:
    """The kernel's integer arguments of 32 bits, and tiles that hold nothing else."""
    header = re.search(r"tt\.func public [^\n]*", ttir)
    found = set(re.findall(r"(%\w+): i32", header.group(0))) if header else set()
    for o in operations(ttir):
        if o.name in ("tt.splat", "tt.broadcast", "tt.expand_dims") and found.issuperset(o.operands):
            found.update(o.results)
    return found


def short_offsets(ttir: str) -> int:
    """Pointers that get an offset of 32 bits with a product in it, which wraps silently past 2^31.

    A program's number times a tile's size does so as soon as a tensor has that many elements. A range, a sum of
    sizes or a number that was loaded stays as small as it was.
    """
    reached = _reached(
        [r for o in _products(ttir) for r in o.results], ttir, skip=("arith.extsi", "arith.extui", "tt.addptr")
    )
    return sum(
        o.name == "tt.addptr" and bool(_SHORT.search(o.text)) and o.operands[1] in reached for o in operations(ttir)
    )


def short_products(ttir: str) -> int:
    """32-bit products of an index and an argument (a stride, a size) that become part of an address.

    They wrap before they are widened. A product of two arguments is a size and does not; a division or a
    remainder ends the trail, for what comes out is no larger than what went in.
    """
    arguments = _arguments(ttir)
    addresses = {o.operands[1] for o in operations(ttir) if o.name == "tt.addptr"}
    indexed = [o for o in _products(ttir) if len(arguments.intersection(o.operands[:2])) == 1]
    constants = {r for o in operations(ttir) if o.name == "arith.constant" for r in o.results}
    return sum(
        bool(_reached(o.results, ttir, skip=("tt.addptr",)) & addresses)
        for o in indexed
        if not constants.intersection(o.operands)
    )


def _constants(ttir: str) -> set[str]:
    """Constants and ranges within a tile, and sums and products of them."""
    found: set[str] = set()
    for o in operations(ttir):
        if o.name in ("arith.constant", "tt.make_range") or (
            o.name in _KEEPS and o.operands and found.issuperset(o.operands)
        ):
            found.update(o.results)
    return found


# ---- what the source asked for


def specialised(ttir: str) -> bool:
    """Whether a loop asks for warps of its own for loads and for products."""
    return "tt.warp_specialize" in ttir


def descriptor_operations(ttir: str) -> tuple[int, int]:
    """Loads and stores through tensor descriptors (the memory accelerator of Hopper and later)."""
    names = [o.name for o in operations(ttir)]
    return (
        sum(n in ("tt.descriptor_load", "tt.experimental_descriptor_load") for n in names),
        sum(n in ("tt.descriptor_store", "tt.experimental_descriptor_store") for n in names),
    )
