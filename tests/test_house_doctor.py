"""`minillm doctor` says what is there and what is not, and never falls over."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minillm import cli
from minillm.cli import doctor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """A function that makes only the given distributions appear installed."""

    def pretend(**versions: str) -> None:
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def find(rows: list[dict], name: str) -> dict:
    (found,) = [row for row in rows if row["name"] == name]
    return found


def test_in_the_tests_own_environment_nothing_is_wrong(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(set(row) == {"name", "version", "status", "note"} for row in rows)
    assert find(rows, "numpy")["version"] == importlib.metadata.version("numpy")
    assert "threads" in find(rows, "BLAS")["note"]
    assert find(rows, "kernels")["status"] == "ok"


def test_without_the_core_it_reports_problems(installed, capsys):
    installed()
    assert cli.main(["doctor", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert find(rows, "numpy")["status"] == "problem"
    assert find(rows, "torch")["status"] == "missing"
    assert "pip install '.[kernels]'" in find(rows, "torch")["note"]
    assert find(rows, "GPU")["status"] == "missing"


def test_it_runs_on_an_interpreter_without_any_package():
    done = subprocess.run(
        [sys.executable, "-S", "-m", "minillm", "doctor", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert find(json.loads(done.stdout), "numpy")["status"] == "problem"


def test_a_torch_that_does_not_import_is_one_line(installed, monkeypatch):
    installed(torch="2.13.0")
    monkeypatch.setattr(doctor, "GPU", "raise OSError('libcudart.so: cannot open')")
    assert doctor.gpu_row()["status"] == "problem"
    assert doctor.gpu_row()["note"] == "torch cannot be imported: OSError: libcudart.so: cannot open"


def test_a_probe_that_hangs_is_given_up():
    assert "timed out" in doctor.ask_python("import time; time.sleep(60)", seconds=1)["error"]


def test_a_triton_that_torch_does_not_want_is_a_problem(installed, monkeypatch):
    installed(torch="2.13.0", triton="3.8.0")
    wanted = ['numpy; extra == "x"', 'triton==3.7.1; platform_system == "Linux"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    assert "asks for triton 3.7.1, not 3.8.0" in doctor.triton_pair_rows()[0]["note"]
    installed(torch="2.13.0", triton="3.7.1")
    assert doctor.triton_pair_rows() == []


def test_another_package_called_kernels_is_found_out(tmp_path, monkeypatch, installed):
    installed(kernels="0.18.5")
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("__version__ = '0.18.5'\n")
    spec = SimpleNamespace(submodule_search_locations=[str(other)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert doctor.kernels_row()["status"] == "problem"
    assert "environment of its own" in doctor.kernels_row()["note"]


def test_another_distribution_called_kernels_beside_ours_is_found_out(installed):
    installed(kernels="0.18.5")
    assert doctor.kernels_row()["status"] == "problem"
    installed()
    assert doctor.kernels_row()["status"] == "ok"


def test_a_missing_kernels_package_is_said(monkeypatch, installed):
    installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.kernels_row()["status"] == "missing"


def test_a_stale_installation_is_a_problem(installed):
    installed(**{doctor.DISTRIBUTION: "0.0.1"})
    assert doctor.minillm_row()["status"] == "problem"
