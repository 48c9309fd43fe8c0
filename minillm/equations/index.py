"""The index itself: catalogue and scan put together, checked, stored and shown."""

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minillm.checks import require
from minillm.equations.catalogue import Entry, load_catalogue
from minillm.equations.scan import scan_code, scan_lessons, scan_tests

STORED = Path(__file__).with_name("index.json")
REFRESH = "minillm equations --write"


@dataclass(frozen=True)
class IndexRow:
    """One id and where it stands; empty lists where it does not."""

    id: str
    kind: str
    section: int
    name: str
    latex: str
    source: str
    code: list[str] = field(default_factory=list)
    kernel: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)
    lessons: list[str] = field(default_factory=list)

    @property
    def implemented(self) -> bool:
        """Whether there is anything: code or a test."""
        return bool(self.code or self.kernel or self.tests)

    @property
    def complete(self) -> bool:
        """Whether it has what its kind needs: a row code and a test, a worked number a test."""
        return bool(self.tests) and (self.kind == "worked" or bool(self.code))


@dataclass(frozen=True)
class Problem:
    """Something that the check objects to."""

    id: str
    text: str


def checkout_root() -> Path | None:
    """The project's folder, if this package lies in a checkout with tests and lessons beside it."""
    root = Path(__file__).resolve().parents[2]
    wanted = ("pyproject.toml", "tests", "lessons", "kernels")
    return root if all((root / name).exists() for name in wanted) else None


def build_index(root: Path) -> tuple[list[IndexRow], list[Problem]]:
    """Scan a checkout; return a row for every id of the catalogue, and ids that are not in it."""
    catalogue = load_catalogue()
    found = {
        "code": scan_code(root, "minillm"),
        "kernel": scan_code(root, "kernels"),
        "tests": scan_tests(root),
        "lessons": scan_lessons(root),
    }
    strangers = [
        Problem(id_, f"is not in the catalogue, but stands in {', '.join(places[:3])}")
        for where in ("code", "kernel", "tests")
        for id_, places in found[where].items()
        if id_ not in catalogue
    ]
    rows = [_row(entry, {where: ids.get(entry.id, []) for where, ids in found.items()}) for entry in catalogue.values()]
    return rows, strangers


def _row(entry: Entry, places: dict[str, list[str]]) -> IndexRow:
    return IndexRow(entry.id, entry.kind, entry.section, entry.name, entry.latex, entry.source, **places)


def load_index() -> tuple[list[IndexRow], list[Problem]]:
    """The index: scanned anew in a checkout, as it was committed elsewhere."""
    root = checkout_root()
    if root is not None:
        return build_index(root)
    require(STORED.is_file(), "equations", "the stored index", f"at {STORED}", "no such file")
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    return [
        _row(e, stored.get(e.id, {"code": [], "kernel": [], "tests": [], "lessons": []}))
        for e in load_catalogue().values()
    ], []


def stored_form(rows: Iterable[IndexRow]) -> str:
    """The text of ``index.json``: the four lists of every id that has any."""
    lists = ("code", "kernel", "tests", "lessons")
    return (
        json.dumps({r.id: {k: asdict(r)[k] for k in lists} for r in rows if r.implemented or r.lessons}, indent=1)
        + "\n"
    )


def write_index(rows: Iterable[IndexRow]) -> Path:
    """Store the index in the package, replaced only when complete."""
    with tempfile.NamedTemporaryFile("w", dir=STORED.parent, delete=False, encoding="utf-8") as part:
        part.write(stored_form(rows))
    os.replace(part.name, STORED)
    STORED.chmod(0o644)
    return STORED


def check(rows: Iterable[IndexRow], strangers: Iterable[Problem] = ()) -> list[Problem]:
    """What is inconsistent: code without a test, a row with a test and no code, ids that nobody knows."""
    problems = list(strangers)
    for row in rows:
        if (row.code or row.kernel) and not row.tests:
            problems.append(Problem(row.id, f"has code ({(row.code + row.kernel)[0]}) but no test"))
        if row.kind == "row" and row.tests and not row.code:
            problems.append(Problem(row.id, f"has a test ({row.tests[0]}) but no code"))
    return problems


def missing(rows: Iterable[IndexRow], sections: Iterable[int]) -> list[Problem]:
    """Which ids of some sections lack code or a test."""
    wanted = set(sections)
    known = {row.section for row in rows}
    require(wanted <= known, "equations", "the sections", f"in {min(known)}..{max(known)}", sorted(wanted - known))
    return [
        Problem(
            row.id, "has no test" if row.code or row.kind == "worked" else "has no code" if row.tests else "is missing"
        )
        for row in rows
        if row.section in wanted and not row.complete
    ]
