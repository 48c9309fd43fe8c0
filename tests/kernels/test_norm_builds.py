"""What the compiler makes of the norms: a table of registers kept beside the test, and every target when asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("registers_norm_sm_90.json")  # UPDATE_TABLES=1 in the environment writes it again
SLACK = 8  # registers: another build of the same compiler may differ by a few


def compiled(*arguments):
    """The rows of `python -m kernels compile norm`, in a process of its own as always."""
    done = subprocess.run(
        [sys.executable, "-m", "kernels", "compile", "norm", *arguments, "--json"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows():
    return compiled("--target", "sm_90")


def name(row):
    return f"{row['kernel']} {row['config']}"


def test_registers_and_shared_memory_are_those_of_the_table(rows):
    found = {name(row): [row["registers"], row["shared"]] for row in rows}
    if os.environ.get("UPDATE_TABLES"):
        entries = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "builds": {{\n{entries}\n}}}}\n')
    table = json.loads(TABLE.read_text())
    if table["triton"].split(".")[:2] != triton.__version__.split(".")[:2]:
        pytest.skip(f"the table is of triton {table['triton']}, this is {triton.__version__}")
    assert found.keys() == table["builds"].keys()
    worse = {
        key: (registers, table["builds"][key][0])
        for key, (registers, shared) in found.items()
        if registers > table["builds"][key][0] + SLACK or shared > table["builds"][key][1]
    }
    assert not worse, f"more registers or shared memory than the table says: {worse}"


def test_bytes_of_the_machine_code_are_those_of_the_formula(rows):
    """`ok` says so too; here the numbers themselves, so that this test fails alone if the check were dropped."""
    exact = [row for row in rows if row["expected_bytes"]]
    assert len(exact) > 50
    for row in exact:
        if "unaligned" not in row["config"]:
            assert [row["bytes_read_16"], row["bytes_written_16"]] == row["expected_bytes"], name(row)


def test_sixteen_bytes_at_a_time_exactly_where_alignment_is_promised(rows):
    for row in rows:
        wide = 128 in row["load_bits"]
        assert wide == ("unaligned" not in row["config"]), name(row)


def test_every_kernel_is_compiled(rows):
    source = (ROOT / "kernels" / "norm" / "kernel.py").read_text()
    there = {line.split("(")[0].removeprefix("def ") for line in source.splitlines() if line.startswith("def ")}
    assert {row["kernel"] for row in rows} == there


@pytest.mark.slow
def test_every_shipped_configuration_on_every_target():
    rows = compiled("--thorough")
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not [f"{name(row)} {row['target']}: {row['problems']}" for row in rows if not row["ok"]]
