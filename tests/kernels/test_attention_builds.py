"""What the compiler makes of attention: a table of registers kept beside the test, and every target when asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("registers_attention_sm_90.json")  # UPDATE_TABLES=1 in the environment writes it again
SLACK = 8  # registers: another build of the same compiler may differ by a few


def compiled(*arguments):
    """The rows of `python -m kernels compile attention`, in a process of its own as always."""
    done = subprocess.run(
        [sys.executable, "-m", "kernels", "compile", "attention", *arguments, "--json"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def name(row):
    return f"{row['kernel']} {row['config']}"


@pytest.mark.slow
def test_every_shipped_configuration_on_every_target():
    rows = compiled()
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not [f"{name(row)} {row['target']}: {row['problems']}" for row in rows if not row["ok"]]
    shipped = {
        name(row): [row["registers"], row["shared"]] for row in rows if row["shipped"] and row["target"] == "sm_90"
    }
    if os.environ.get("UPDATE_TABLES"):
        entries = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in shipped.items())
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "builds": {{\n{entries}\n}}}}\n')
    table = json.loads(TABLE.read_text())
    if table["triton"].split(".")[:2] != triton.__version__.split(".")[:2]:
        pytest.skip(f"the table is of triton {table['triton']}, this is {triton.__version__}")
    assert shipped.keys() == table["builds"].keys()
    worse = {
        key: (registers, table["builds"][key][0])
        for key, (registers, shared) in shipped.items()
        if registers > table["builds"][key][0] + SLACK or shared > table["builds"][key][1]
    }
    assert not worse, f"more registers or shared memory than the table says: {worse}"


def test_every_kernel_is_compiled():
    """Read as text, so that it costs nothing: each kernel is named in `builds.py`, and each target in its list."""
    folder = ROOT / "kernels" / "attention"
    builds = (folder / "builds.py").read_text()
    for path in folder.glob("kernel_*.py"):
        kernels = [
            line.split("(")[0].removeprefix("def ") for line in path.read_text().splitlines() if line.startswith("def ")
        ]
        for kernel in (k for k in kernels if k.endswith("_kernel")):
            assert f"{path.stem}.{kernel}" in builds, kernel
    assert all(target in builds for target in ("sm_80", "sm_90", "sm_100", "gfx942"))


def test_tensor_core_instructions_follow_from_the_tiles():
    """One target and width in the fast part: the forward on Hopper, with the closed form held by the build itself."""
    code = (
        "from kernels import inspection\nfrom kernels.aot import attempt\nfrom kernels.attention import builds, config\n"
        "tile = config.plan_for('sm_90', 2, 128, 128).forward\n"
        "build = builds.forward('sm_90', 'causal', 'bf16', 128, 128, tile)\n"
        "(compiled,) = attempt([build], 'sm_90')\n"
        "print(compiled.tensor_core, compiled.register_a, inspection.faults(build, compiled, 'sm_90'))\n"
        "print(builds.products('sm_90', tile, [(128, 128, 128), (128, 128, 128)]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    found, wanted = done.stdout.strip().splitlines()
    assert found.split()[0] == wanted == "16", done.stderr
    assert found.endswith("[]")
