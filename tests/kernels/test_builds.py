"""What the compiler makes of every family on every target: the gates, and the table of builds kept beside this file.

`UPDATE_TABLES=1 make test ARGS=tests/kernels/test_builds.py` writes the tables of this version of Triton again; the
difference is for the reviewer to read. Other versions: tests/kernels/other_tritons.py.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from kernels import registry
from tests.kernels import tables

ROOT = Path(__file__).parents[2]
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}

# Seven of the 3,200 shipped builds that are less than the gates ask for under this version of Triton, by family.
HELD_BACK = "the assembler puts two to ten values on the stack although registers are left"
KNOWN = {
    "attention": {
        "_backward_keys_kernel causal bf16 96/96 32x64 sm_80": "two of its four products stand there twice",
        "_backward_keys_kernel causal bf16 96/96 32x64 sm_100": HELD_BACK,
    },
    "decode": {"_decode_kernel group of 8, 4 new bf16 window, cap sm_100": HELD_BACK},
    "experts": {"_route_kernel softmax bf16 E=512 sm_80": HELD_BACK},
    "linear_attention": {
        "_forward_kernel fp16 128x128 sm_90": "needs eight registers more than there are: 32 bytes on the stack",
        "_sums_kernel backwards bf16 128x128 sm_100": HELD_BACK,
        "_sums_kernel backwards bf16 256x64 sm_100": HELD_BACK,
    },
}


def compiled(family, *arguments):
    """The rows of `python -m kernels compile`, in a process of its own as always."""
    done = subprocess.run(
        [sys.executable, "-m", "kernels", "compile", family, *arguments, "--json"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode in (0, 1) and done.stdout, done.stderr
    return json.loads(done.stdout)


def name(row):
    return f"{row['kernel']} {row['config']} {row['target']}"


def closed_gates(rows):
    """What the gates of `kernels/gates.py` say."""
    return [f"{name(row)}: {row['problems']}" for row in rows if not row["ok"]]


def worse_than_the_table(family, rows):
    """Regressions against the table, which UPDATE_TABLES=1 writes again."""
    found = tables.of_rows(rows)
    if os.environ.get("UPDATE_TABLES"):
        tables.write(family, triton.__version__, found)
    kept = tables.read(family, triton.__version__)
    if kept is None and tables.short(triton.__version__) not in tables.VERSIONS:
        return []
    return tables.regressions(found, kept)


def wrong_widths(rows):
    """16 bytes at a time only where alignment is promised. The gate says so too; here by the configuration's words."""
    loose = [row for row in rows if "unaligned" in row["config"]]
    nvidia = [row for row in loose if not row["target"].startswith("gfx")]  # AMD's wide loads take any address
    wide = [f"{name(row)}: wide accesses" for row in nvidia if 128 in row["load_bits"] + row["store_bits"]]
    return wide if loose else ["there is no build without alignment"]


def wrong_bytes(rows):
    """Bytes of the machine code that are not those of the formula."""
    return [
        f"{name(row)}: {row['bytes_read_16']} and {row['bytes_written_16']} bytes, not {row['expected_bytes']}"
        for row in rows
        if row["expected_bytes"] and not row["target"].startswith("gfx") and "unaligned" not in row["config"]
        if [row["bytes_read_16"], row["bytes_written_16"]] != row["expected_bytes"]
    ]


def forgotten_kernels(family, rows):
    """Kernels that are in the family's folder and not among its builds, or the other way round."""
    there, built = launched_kernels(ROOT / "kernels" / family), {row["kernel"] for row in rows}
    return [f"{kernel} is never compiled" for kernel in there - built] + [f"no source of {k}" for k in built - there]


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_builds(family):
    """All in one test, so that the family is compiled once however many processes share the tests."""
    rows = compiled(family)
    assert {row["target"] for row in rows} == TARGETS
    complaints = [
        *closed_gates(rows), *wrong_widths(rows), *wrong_bytes(rows), *forgotten_kernels(family, rows),
        *worse_than_the_table(family, rows),
    ]  # fmt: skip
    assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("family", registry.FAMILIES)
def test_every_shipped_configuration(family):
    rows = compiled(family, "--thorough")
    assert {row["target"] for row in rows} == TARGETS
    known = KNOWN.get(family, {})
    closed = {name(row) for row in rows if not row["ok"]}
    assert [c for c in closed_gates(rows) if c.partition(": ")[0] not in known] == []
    assert known.keys() <= closed, "fine now, and still listed as known"


def launched_kernels(folder):
    """The jitted functions of a family that store something themselves or by a helper: those named `..._kernel`."""
    names = set()
    for path in folder.glob("kernel*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            jitted = isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
            if jitted and node.name.endswith("_kernel"):
                names.add(node.name)
    return names


# ---- these checks can fail

ROW = {"kernel": "k", "config": "a unaligned", "target": "sm_90", "ok": False, "problems": ["bad"], "load_bits": [16, 128],
       "store_bits": [16], "expected_bytes": [4096, 0], "bytes_read_16": 0, "bytes_written_16": 0}  # fmt: skip


def test_each_check_complains():
    assert closed_gates([ROW]) == ["k a unaligned sm_90: ['bad']"]
    assert closed_gates([{**ROW, "ok": True}]) == []
    assert wrong_widths([ROW]) == ["k a unaligned sm_90: wide accesses"]
    assert wrong_widths([{**ROW, "load_bits": [16]}]) == []
    assert wrong_widths([{**ROW, "config": "a"}]) == ["there is no build without alignment"]
    assert wrong_bytes([ROW]) == []
    assert len(wrong_bytes([{**ROW, "config": "a"}])) == 1
    assert "no source of k" in forgotten_kernels("norm", [ROW])
    assert "_forward_kernel is never compiled" in forgotten_kernels("norm", [ROW])


KEPT = {"k a": {"sm_90": [64, 1024, 8, 0, 4]}}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([64, 1024, 8, 0, 4], None),
        ([72, 1024, 8, 0, 3], None),  # eight registers more are let through, and what follows from them
        ([40, 512, 8, 0, 6], None),
        ([73, 1024, 8, 0, 4], "73 registers, were 64"),
        ([64, 1040, 8, 0, 4], "1040 shared"),
        ([64, 1024, 4, 0, 4], "4 tensor-core instructions, were 8"),
        ([64, 1024, 8, 2, 4], "2 spills"),
        ([64, 1024, 8, 0, 3], "3 programs fit, were 4"),
    ],
)
def test_what_counts_as_worse(line, words):
    said = tables.regressions({"k a": {"sm_90": line}}, KEPT)
    assert said == [] if words is None else len(said) == 1 and words in said[0]


def test_what_is_new_or_gone_is_said():
    line = [64, 1024, 8, 0, 4]
    assert tables.regressions({"k a": {"sm_80": line}}, KEPT) == ["k a sm_80: is new", "k a sm_90: is gone"]
    assert tables.regressions({"k b": {"sm_90": line}}, KEPT) == [
        "k a: is in the table and no longer built", "k b: is not in the table"
    ]  # fmt: skip
    assert "UPDATE_TABLES" in tables.regressions(KEPT, None)[0]


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables.write("norm", "3.7.1", KEPT)
    tables.write("norm", "3.9.0", {})
    assert tables.read("norm", "3.7.9") == KEPT
    assert tables.read("norm", "3.9.0") == {}
    assert tables.read("norm", "3.6.0") is None
    assert tables.read("token_loss", "3.7.1") is None
