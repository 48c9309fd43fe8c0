"""The table of builds: what the compiler made of every kernel, kept in git so that a review sees what a change did.

One file a family, in it one part for each version of Triton (a compiler of its own each), one line a build, and in
the line for every target: registers, shared memory, tensor-core instructions, spills, programs that fit.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("tables")
VERSIONS = ("3.6", "3.7", "3.9")  # of Triton: of the Hopper machine, of constraints.txt, the newest
COLUMNS = ("registers", "shared", "tensor_core", "spills", "occupancy")
SLACK = 8  # registers: another build of the same compiler may differ by a few
HEAD = "registers, shared memory, tensor-core instructions, spills, programs that fit on a multiprocessor"

Table = dict[str, dict[str, list[int]]]


def short(version: str) -> str:
    """3.7 of 3.7.1: patches do not change what is compiled."""
    return ".".join(version.split(".")[:2])


def of_rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of a command's rows."""
    table: Table = {}
    for row in rows:
        line = table.setdefault(f"{row['kernel']} {row['config']}", {})
        line[row["target"]] = [row[column] for column in COLUMNS]
    return table


def read(family: str, version: str) -> Table | None:
    """The table of a family for a version of Triton; None where nobody has made one."""
    path = FOLDER / f"{family}.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get(short(version))


def write(family: str, version: str, table: Table) -> None:
    """Put a table in the place of the one of that version."""
    path = FOLDER / f"{family}.json"
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    there = {**there, "columns": HEAD, short(version): table}
    parts = [f'"columns": {json.dumps(HEAD)}']
    for key in sorted(set(there) - {"columns"}):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(line)}" for name, line in there[key].items())
        parts.append(f'"{key}": {{\n{lines}\n}}')
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def merged(kept: Table, found: Table) -> Table:
    """A table with what was found now, and for the targets that were not looked at what it held before."""
    return {name: {**kept.get(name, {}), **line} for name, line in found.items()}


def only(kept: Table, found: Table) -> Table:
    """The part of a table that has the targets that were looked at."""
    targets = {target for line in found.values() for target in line}
    parts = {name: {t: row for t, row in line.items() if t in targets} for name, line in kept.items()}
    return {name: line for name, line in parts.items() if line}


def regressions(found: Table, kept: Table | None) -> list[str]:
    """What got worse, what is new or gone, in words. Fewer registers or less shared memory are no fault."""
    if kept is None:
        return ["there is no table: UPDATE_TABLES=1 makes one"]
    said = [f"{name}: is not in the table" for name in found.keys() - kept.keys()]
    said += [f"{name}: is in the table and no longer built" for name in kept.keys() - found.keys()]
    for name in found.keys() & kept.keys():
        for target in found[name].keys() | kept[name].keys():
            now, then = found[name].get(target), kept[name].get(target)
            if now is None or then is None:
                said.append(f"{name} {target}: {'is new' if then is None else 'is gone'}")
            else:
                said += [f"{name} {target}: {fault}" for fault in _worse(now, then)]
    return sorted(said)


def _worse(now: Sequence[int], then: Sequence[int]) -> list[str]:
    a, b = dict(zip(COLUMNS, now)), dict(zip(COLUMNS, then))
    said = []
    if a["registers"] > b["registers"] + SLACK:
        said.append(f"{a['registers']} registers, were {b['registers']}")
    said += [f"{a[c]} {c}, were {b[c]}" for c in ("shared", "spills") if a[c] > b[c]]
    if a["tensor_core"] != b["tensor_core"]:
        said.append(f"{a['tensor_core']} tensor-core instructions, were {b['tensor_core']}")
    if a["occupancy"] < b["occupancy"] and a["registers"] <= b["registers"]:
        said.append(f"{a['occupancy']} programs fit, were {b['occupancy']}")
    return said
