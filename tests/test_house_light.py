"""What importing costs: minillm without torch, the command without NumPy, `kernels` without anything."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def loaded_after(code: str) -> set[str]:
    """The top-level modules in memory after running code in a fresh interpreter in the project's folder."""
    report = "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_loads_no_numpy():
    assert not loaded_after("import minillm.cli.doctor; minillm.cli.build_parser(None)") & {"numpy", "torch", "triton"}


def test_every_module_of_the_core_loads_without_torch():
    walk = """
import importlib, pkgutil, minillm
apart = {"minillm.__main__", "minillm.cli.benchmark.torch_peer", "minillm.training.distributed"}
for found in pkgutil.walk_packages(minillm.__path__, "minillm."):
    if found.name not in apart:
        importlib.import_module(found.name)
"""
    loaded = loaded_after(walk)
    assert "numpy" in loaded
    assert not loaded & {"torch", "triton", "transformers", "hypothesis", "pytest", "nbclient", "jupytext"}


def test_our_kernels_package_imports_nothing():
    assert not loaded_after("import kernels") & {"numpy", "torch", "triton", "minillm"}
