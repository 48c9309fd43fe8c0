"""What is installed: versions that agree, a wheel that has everything, and two commands that set themselves up."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import kernels
import minillm
from minillm.cli.doctor import WITHOUT

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command to its end; what it printed is in the result."""
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def direct_dependencies() -> dict[str, str]:
    """Name to lower bound of everything that pyproject.toml names, whatever the extra."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", text) for texts in lists for text in texts]
    return {match[1]: match[2] for match in found if match}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_one_plain_version_below_the_one_that_transformers_looks_for():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert PROJECT["version"] == minillm.__version__ == kernels.__version__
    assert f"version: {minillm.__version__}\n" in citation
    assert re.fullmatch(r"\d+\.\d+\.\d+", minillm.__version__)
    assert numbers(minillm.__version__) < (0, 1, 1)


def test_every_direct_dependency_is_pinned_at_or_above_its_bound():
    for name, bound in direct_dependencies().items():
        assert numbers(pins()[name]) >= numbers(bound), name


def test_torch_and_triton_move_together():
    assert (pins()["torch"], pins()["triton"]) == ("2.13.0", "3.7.1")


def test_the_doctor_knows_every_dependency_and_no_other():
    known = {name for packages in WITHOUT.values() for name in packages}
    assert known == direct_dependencies().keys() - {"setuptools"}
    assert WITHOUT["core"].keys() == {re.match(r"[\w-]+", text)[0] for text in PROJECT["dependencies"]}


def test_no_page_tells_to_install_somebody_elses_package():
    pages = [p for pattern in ("*.md", "*.toml", "*.cff", "Makefile") for p in ROOT.glob(pattern)]
    pages += [p for folder in ("minillm", "kernels", "lessons") for p in (ROOT / folder).rglob("*.py")]
    wrong = [
        str(p) for p in pages if re.search(r"pip install +minillm(?!-from-scratch)", p.read_text(encoding="utf-8"))
    ]
    assert not wrong


# ------------------------------------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the working tree, built from a copy so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    rubbish = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in ("minillm", "kernels"):
        shutil.copytree(ROOT / package, tree / package, ignore=rubbish)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    built = run(sys.executable, "-m", "pip", "wheel", *offline, "-w", str(folder), str(tree))
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in ("minillm", "kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert wanted - held == set(), "add these to [tool.setuptools.package-data] or give their folder an __init__.py"
    assert not [name for name in held if name.startswith(("tests/", "lessons/", "figures/"))]


@pytest.mark.slow
def test_the_wheel_installs_into_a_new_environment_and_works(wheel, tmp_path):
    """Dependencies are borrowed from this environment by a path file, so that the network is not needed."""
    venv = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", str(venv)).returncode == 0
    scripts = venv / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    installed = run(python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    assert installed.returncode == 0, installed.stderr

    origin = run(python, "-c", "import minillm, kernels; print(minillm.__file__, kernels.__file__)", cwd=tmp_path)
    assert origin.stdout.count(str(site)) == 2
    command = str(scripts / "minillm")
    assert "doctor" in run(command, "--help", cwd=tmp_path).stdout
    report = run(command, "doctor", cwd=tmp_path)
    assert report.returncode == 0, report.stdout + report.stderr
    assert run(command, "nonsense", cwd=tmp_path).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import transformers",
        "from transformers import LlamaConfig, LlamaForCausalLM",
        "from transformers.utils.import_utils import is_kernels_available; assert not is_kernels_available()",
        "from trl import GRPOTrainer",
    ],
)
def test_transformers_and_trl_import_beside_our_kernels_package(code):
    ours = "import kernels; assert kernels.MINILLM_KERNELS"
    done = run(sys.executable, "-c", f"{ours}\n{code}", TRANSFORMERS_OFFLINE="1", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ the set-up


@pytest.fixture
def make(tmp_path):
    """A copy of the Makefile whose python3 is a script: "version" and "venv" switches say what it can do.

    The environment it makes has a python that writes down what it is asked and fails at pip while "broken" exists.
    """
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    inner = f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
case "$*" in *"install"*) test ! -e {tmp_path}/broken;; *) true;; esac
"""
    outer = f"""#!/bin/sh
case "$*" in
  *version_info*) test ! -e {tmp_path}/old;;
  *ensurepip*) test ! -e {tmp_path}/novenv;;
  "-m venv"*) mkdir -p .venv/bin; cp {tmp_path}/inner .venv/bin/python;;
  --version) echo Python 3.9.2;;
esac
"""
    for name, text in (("inner", inner), ("python3", outer)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def call(*words: str) -> subprocess.CompletedProcess:
        (tmp_path / "asked").unlink(missing_ok=True)
        return run("make", f"PYTHON={tmp_path}/python3", *words, cwd=tmp_path, MAKEFLAGS="", MFLAGS="")

    return call


def asked(folder: Path) -> str:
    return (folder / "asked").read_text() if (folder / "asked").exists() else ""


def test_make_help_lists_every_target(make):
    text = make().stdout
    for target in ("tour", "test", "lessons", "figures", "bench", "mutants", "clean", "help"):
        assert re.search(rf"^  {target} ", text, re.MULTILINE), target


@pytest.mark.parametrize(
    ("lack", "message"), [("novenv", "apt-get install python3-venv"), ("old", "Python 3.11 or later is needed")]
)
def test_make_says_what_the_machine_lacks_and_leaves_nothing_behind(make, tmp_path, lack, message):
    (tmp_path / lack).touch()
    done = make("tour")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_sets_up_once(make, tmp_path):
    assert make("tour").returncode == 0
    assert "pip install" in asked(tmp_path)
    assert make("tour", "QUICK=1").returncode == 0
    assert "pip" not in asked(tmp_path)
    assert "-m minillm tour --quick" in asked(tmp_path)


def test_make_sets_up_again_when_the_dependencies_change(make, tmp_path):
    make("tour")
    os.utime(tmp_path / "constraints.txt", (2**32, 2**32))
    make("tour")
    assert "pip install" in asked(tmp_path)


def test_make_completes_a_set_up_that_was_cut_short(make, tmp_path):
    (tmp_path / "broken").touch()
    assert make("tour").returncode != 0
    assert "minillm tour" not in asked(tmp_path)
    (tmp_path / "broken").unlink()
    assert make("tour").returncode == 0
    assert "pip install" in asked(tmp_path)


@pytest.mark.parametrize("damage", ["no python", "moved", "half made"])
def test_make_replaces_an_environment_that_cannot_work(make, tmp_path, damage):
    if damage == "half made":
        (tmp_path / ".venv" / "lib").mkdir(parents=True)
    else:
        make("tour")
        (tmp_path / ".venv" / "left over").touch()
        if damage == "no python":
            (tmp_path / ".venv" / "bin" / "python").unlink()
        else:
            (tmp_path / ".venv" / ".folder").write_text("/somewhere/else\n")
    assert make("tour").returncode == 0
    assert "pip install" in asked(tmp_path)
    assert not (tmp_path / ".venv" / "left over").exists()
