"""The kernels under the other versions of Triton that they have to run on, each in an environment of its own.

    python tests/kernels/other_tritons.py            # both versions, beside one another
    python tests/kernels/other_tritons.py 3.6.0      # one of them; UPDATE_TABLES=1 writes its tables again

An environment holds Triton and what that version needs otherwise, and borrows everything else (torch above all)
from the environment that runs this script. In it every family is compiled for Hopper (`--target`: for others too)
and held against the gates and the tables, and a small part of `compare` runs in the interpreter. The environments
stay in `.tritons`.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kernels import registry  # noqa: E402
from tests.kernels import tables  # noqa: E402

FOLDER = ROOT / ".tritons"
# The interpreter of 3.6 breaks with NumPy 2.4: "only 0-dimensional arrays can be converted to Python scalars".
VERSIONS = {"3.6.0": ("numpy==2.3.5",), "3.9.0": ()}
EXAMPLES = 3

# What another compiler does worse than the one that the tiles were chosen under, by version: the build, and why it
# stays. The tables hold it to what it is.
LITTLE = "8 to 32 bytes a thread on the stack, none under 3.7"
FEW = "two values on the stack (8 bytes) that 3.7 and 3.9 keep in registers"
KNOWN = {
    "3.6.0": {
        "_forward_kernel layer bf16 d=4096 sm_90": FEW,
        "_forward_kernel layer bf16 d=4096 sm_100": FEW,
        "_backward_kernel layer fp32 d=4096 sm_80": FEW,
        "_backward_kernel add-layer fp32 d=4096 sm_80": FEW,
        "_decode_kernel group of 8 bf16 window, cap sm_90": LITTLE,
        "_grouped_kernel down fp32 64x64x32 sm_90": LITTLE,
    },
    "3.9.0": {
        "_decode_kernel latent, 128 heads bf16 plain sm_90": LITTLE,
        "_forward_kernel bf16 128x128 elu sm_90": LITTLE,
        "_forward_kernel bf16 256x64 elu sm_90": LITTLE,
        "_dk_kernel fp32 64x64 elu sm_90": LITTLE,
    },
}

COMPARE = f"""
import json, sys
from kernels import compare
found = compare.compare(sys.argv[1], examples={EXAMPLES}, number=0, properties=("reference", "gradient"))
json.dump([[o.property, o.function, o.dtype, o.passed, o.error or repr(o.problem)] for o in found], sys.stdout)
"""


def environment(version: str) -> Path:
    """The Python of the environment of a version, made if it is not there."""
    folder = FOLDER / version
    python = folder / "bin" / "python"
    if _version_in(python) == version:
        return python
    _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
    _run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", f"triton=={version}", *VERSIONS[version]]
    )  # fmt: skip
    (library,) = folder.glob("lib/python*/site-packages")
    paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (library / "borrowed.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    if _version_in(python) != version:
        raise RuntimeError(f"the environment {folder} has no Triton {version}: delete it and try again")
    return python


def _version_in(python: Path) -> str:
    if not python.exists():
        return ""
    code = "import numpy, torch, triton; print(triton.__version__)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def _run(command: Sequence[str | Path], **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    if done.returncode not in (0, 1) or (done.returncode and not done.stdout):
        raise RuntimeError(f"{' '.join(map(str, command[:4]))} ...: {done.stderr[-2000:]}")
    return done.stdout


def check(version: str, families: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Everything that is wrong under one version, in words; progress goes to standard error."""
    python = environment(version)
    wanted = [part for target in targets for part in ("--target", target)]
    complaints = []
    for family in families:
        start = time.perf_counter()
        try:
            rows = json.loads(
                _run([python, "-m", "kernels", "compile", family, *wanted, "--json"], TRITON_INTERPRET="0")
            )
            complaints += [f"{family}: {c}" for c in judge(version, family, rows)]
            middle = time.perf_counter()
            found = json.loads(_run([python, "-c", COMPARE, family], TRITON_INTERPRET="1"))
            complaints += [f"{family} {' '.join(row[:3])}: {row[4]}" for row in found if not row[3]]
            spent = f"{len(rows)} builds in {middle - start:.0f} s, {len(found)} comparisons in {time.perf_counter() - middle:.0f} s"
        except (RuntimeError, ValueError) as error:
            complaints.append(f"{family}: {error}")
            spent = "stopped"
        print(f"Triton {version} {family}: {spent}", file=sys.stderr, flush=True)
    return complaints


def judge(version: str, family: str, rows: Sequence[dict]) -> list[str]:
    """Closed gates that are not known of this version, known ones that are open again, and regressions."""
    closed = {f"{row['kernel']} {row['config']} {row['target']}": row["problems"] for row in rows if not row["ok"]}
    there = {f"{row['kernel']} {row['config']} {row['target']}" for row in rows}
    known = KNOWN[version].keys() & there
    found, kept = tables.of_rows(rows), tables.read(family, version)
    if os.environ.get("UPDATE_TABLES"):
        tables.write(family, version, tables.merged(kept or {}, found))
        kept = tables.read(family, version)
    return [
        *(f"{name}: {'; '.join(problems)}" for name, problems in closed.items() if name not in known),
        *(f"{name}: is fine now, and still listed as known" for name in known - closed.keys()),
        *(tables.regressions(found, tables.only(kept, found)) if kept else []),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the versions asked for; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", nargs="*", choices=[[], *VERSIONS], help="default: all of them")
    parser.add_argument("--family", action="append", help="default: all of them")
    parser.add_argument("--target", action="append", help="default: sm_90")
    options = parser.parse_args(arguments)
    targets = options.target or ["sm_90"]
    versions, families = options.version or list(VERSIONS), options.family or registry.FAMILIES
    for version in versions:  # one after the other: two downloads at once win nothing
        environment(version)
    with ThreadPoolExecutor(len(versions)) as pool:
        complaints = dict(zip(versions, pool.map(lambda version: check(version, families, targets), versions)))
    for version, said in complaints.items():
        for complaint in said:
            print(f"Triton {version}: {complaint}")
        print(f"Triton {version}: {len(said) or 'no'} complaints about {', '.join(families)}")
    return int(any(complaints.values()))


if __name__ == "__main__":
    sys.exit(main())
