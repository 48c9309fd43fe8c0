"""A process that judges mutants: it loads the heavy libraries once and forks for each mutant.

Tasks come in on standard input and verdicts go out on standard output, one JSON object a line. The mutated file is
written to a temporary folder, and in the child an import hook serves it in place of the real one; the working
tree is only read. A mutant is killed by the first check that fails, or by taking far longer than it should.
"""

import importlib
import importlib.abc
import importlib.util
import inspect
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEST_FOLDERS = ("autograd", "functional", "fused", "nn", "decoding", "alignment")
PATIENCE = 20  # seconds to wait for each second of processor time that is allowed
PRELOADED = [
    "numpy", "scipy.special", "scipy.stats", "scipy.signal", "torch", "hypothesis", "hypothesis.extra.numpy", "pytest",
    "_hypothesis_pytestplugin", "jaxtyping", "beartype", "autograd.numpy", "autograd.scipy.special", "tqdm", "triton",
    "threadpoolctl", "safetensors.numpy", "transformers", "trl.trainer.grpo_trainer",
]  # fmt: skip


class MutantFinder(importlib.abc.MetaPathFinder):
    """Serves one module from another file."""

    def __init__(self, module: str, file: Path):
        self.module, self.file = module, file

    def find_spec(self, fullname, path=None, target=None):
        """The file of the mutant for its module, nothing for any other."""
        return importlib.util.spec_from_file_location(fullname, self.file) if fullname == self.module else None


def module_name(path: str) -> str:
    """The module that a file of the repository holds."""
    return path.removesuffix(".py").replace("/", ".")


def files_for(path: str) -> list[str]:
    """The test files that name the module, those of its own package first and short ones before long ones."""
    package, name = path.split("/")[-2], Path(path).stem
    if package == "autograd":
        found = [
            ROOT / f"tests/autograd/test_{n}.py" for n in ("primitives", "tensor", "precision", "higher_order", "tape")
        ]
        return [str(f.relative_to(ROOT)) for f in found]
    found = tests_naming(name)
    found.sort(key=lambda f: (f.parent.name != package, name not in f.stem, f.stat().st_size))
    for user in users_of(name):
        found += [file for file in tests_naming(user) if file not in found]
    return [str(f.relative_to(ROOT)) for f in found]


def naming(name: str) -> re.Pattern:
    """What an import of a module of functional or fused looks like."""
    return re.compile(rf"\b(functional|fused)(\.| import .*\b){name}\b|\bimport .*\b{name}\b", re.MULTILINE)


def tests_naming(name: str) -> list[Path]:
    """The test files that import a module of functional or fused."""
    files = [file for folder in TEST_FOLDERS for file in sorted((ROOT / "tests" / folder).glob("test_*.py"))]
    return [file for file in files if naming(name).search(file.read_text())]


def users_of(name: str) -> list[str]:
    """The modules of functional and fused that import a module: their tests are its tests too."""
    modules = [file for folder in ("functional", "fused") for file in sorted((ROOT / "minillm" / folder).glob("*.py"))]
    return [file.stem for file in modules if file.stem != name and naming(name).search(file.read_text())]


# ---------------------------------------------------------------------------- the checks, in the child


def check_registry(path: str, function: str) -> None:
    """The walk of tests/test_registry.py over the rows that the mutated module takes part in."""
    walk = importlib.import_module("tests.test_registry")
    module = module_name(path)

    def inner(test):
        return test.hypothesis.inner_test

    for name, row in walk.ROWS.items():
        for kind, form in row.forms.items():
            home = "minillm.autograd.primitives" if kind == "primitive" else form.__module__
            if home != module and not (kind == "derived" and row.written.__module__ == module):
                continue
            if kind == "primitive" and function in walk.ROWS and function != name:
                continue
            if kind == "written":  # its gradient comes from the engine, so only an accident would show here
                inner(walk.test_the_gradient_is_that_of_finite_differences)(name=name, kind=kind, seed=0)
                continue
            for seed in range(8):
                inner(walk.test_the_gradient_is_that_of_finite_differences)(name=name, kind=kind, seed=seed)
                if kind == "derived":
                    inner(walk.test_written_equals_derived_in_float64)(name=name, seed=seed)
                    inner(walk.test_each_result_of_several_may_be_the_only_one_used)(name=name, seed=seed)
            for seed in range(2):
                inner(walk.test_float32_stays_float32)(name=name, kind=kind, seed=seed)
                inner(walk.test_inputs_and_cotangents_are_left_as_they_were)(name=name, kind=kind, seed=seed)
                inner(walk.test_the_memory_layout_of_inputs_and_cotangents_does_not_matter)(
                    name=name, kind=kind, seed=seed, layout="reversed"
                )
            if kind == "primitive":
                inner(walk.test_the_gradient_of_the_gradient_is_that_of_finite_differences)(
                    name=name, kind=kind, seed=0
                )


def check_tests(path: str, function: str) -> str:
    """The test files that name the module, tests that name the function first; the first failure, or nothing."""
    import hypothesis
    import pytest

    class Plugin:
        failed = ""

        def pytest_sessionstart(self):
            """As the tests are run, but without looking for the smallest failing example."""
            phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
            common = {"deadline": None, "database": None, "suppress_health_check": list(hypothesis.HealthCheck)}
            common |= {"derandomize": True, "max_examples": 40}
            hypothesis.settings.register_profile("mutants", phases=phases, **common)
            hypothesis.settings.load_profile("mutants")

        def pytest_collection_modifyitems(self, items):
            """Begin with the tests whose text names the mutated function."""
            word = re.compile(rf"\b{re.escape(function.partition('.')[0])}\b")
            items.sort(key=lambda item: not (word.search(item.name) or word.search(inspect.getsource(item.function))))

        def pytest_runtest_logreport(self, report):
            if report.failed and not self.failed:
                self.failed = report.nodeid

        def pytest_collectreport(self, report):
            if report.failed and not self.failed:
                self.failed = report.nodeid

    plugin = Plugin()
    files = files_for(path)
    if files:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files], plugins=[plugin])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return plugin.failed or str(code)
    return ""


def check_kernels(path: str) -> str:
    """The family's exact problems, then its properties with more and more examples; the first that fails, or nothing."""
    import hypothesis

    compare = importlib.import_module("kernels.compare")
    generate_only = {"phases": (hypothesis.Phase.generate,)}
    compare.settings = lambda **how: hypothesis.settings(**{**how, **generate_only})
    family = path.split("/")[1]
    described = importlib.import_module("kernels.registry").load(family)
    wrong = [name for name, count in importlib.import_module(f"kernels.{family}.witness").witnesses("cpu") if count]
    if wrong:
        return f"witness: {wrong[0]}"
    for examples, dtypes in ((3, ["float32"]), (12, ["float32", "float16"]), (60, ["float32"])):
        for prop in described.PROPERTIES:
            found = compare.compare(family, examples=examples, number=1, dtypes=dtypes, properties=[prop.name])
            for outcome in found:
                if not outcome.passed:
                    return f"{outcome.property} of {outcome.function}, {outcome.dtype}: {outcome.error or outcome.verdict.name}"
    return ""


def judge(task: dict) -> str:
    """What kills the mutant, or an empty string for a survivor."""
    path, function = task["path"], task["function"]
    try:
        if path.startswith("kernels/"):
            return check_kernels(path)
        check_registry(path, function)
    except BaseException as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
    return check_tests(path, function)


# ---------------------------------------------------------------------------- forking


def run_child(task: dict, folder: str, answer: int) -> None:
    """Load the mutant instead of the real module, judge it and write the verdict; does not return."""
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        sys.dont_write_bytecode = True
        file = Path(folder) / Path(task["path"]).name
        file.write_text(task["source"])
        sys.meta_path.insert(0, MutantFinder(module_name(task["path"]), file))
        resource.setrlimit(resource.RLIMIT_CPU, (limit := int(task["limit_s"]), limit))
        verdict = judge(task)
    except BaseException:
        verdict = "broken: " + traceback.format_exc().splitlines()[-1]
    os.write(answer, verdict.encode()[:3000])
    os._exit(0)


def judge_in_child(task: dict) -> dict:
    """Fork, wait, and say what came back and how much processor time it took.

    The limit is one of processor time, so that a busy machine does not kill what should survive.
    """
    with tempfile.TemporaryDirectory() as folder:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            os.setsid()
            run_child(task, folder, send)
        os.close(send)
        verdict = None
        if select.select([receive], [], [], PATIENCE * task["limit_s"])[0]:
            verdict = os.read(receive, 4096).decode(errors="replace")
        else:
            os.killpg(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        os.close(receive)
    if verdict is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        verdict = f"took more than {task['limit_s']:.0f} s"
    elif not verdict and status != 0:
        verdict = f"ended by signal {os.WTERMSIG(status)}"
    return {"index": task["index"], "killed_by": verdict, "seconds": usage.ru_utime + usage.ru_stime}


def main() -> None:
    """Load what every mutant needs, then judge until standard input ends."""
    os.environ.update(MINILLM_TYPECHECK="0", TRITON_INTERPRET="1", CI="")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    sys.modules["torch"].set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(judge_in_child(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
