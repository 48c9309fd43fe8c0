"""The lesson tools, on a small lesson written here."""

from copy import deepcopy
from pathlib import Path

import pytest

from minillm.cli import lessonbook

pytest.importorskip("jupytext")
pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

LESSON = """# %% [markdown]
# # 90 · A small lesson

# %%
print("two:", 1 + 1)

# %%
def double(x):
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION

# %% tags=["check"]
# Exercise 1: double
assert double(3) == 6, "3 doubled is 6"
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "90_small.py"
    path.write_text(LESSON)
    return path


def test_solutions_are_replaced_and_nothing_of_them_is_left():
    stub = lessonbook.without_solutions(
        "def f():\n    ### BEGIN SOLUTION\n    secret = 1\n    return secret\n    ### END SOLUTION"
    )
    assert stub == 'def f():\n    raise NotImplementedError("your turn")'


def test_two_solutions_in_one_cell_and_a_lone_marker():
    two = "### BEGIN SOLUTION\na = 1\n### END SOLUTION\nkeep = 2\n### BEGIN SOLUTION\nb = 3\n### END SOLUTION\n"
    assert "keep = 2" in lessonbook.without_solutions(two)
    assert "a = 1" not in lessonbook.without_solutions(two) and "b = 3" not in lessonbook.without_solutions(two)
    with pytest.raises(lessonbook.LessonError, match="no partner"):
        lessonbook.without_solutions("### BEGIN SOLUTION\na = 1")


@pytest.mark.slow
def test_build_run_student_and_grade(source: Path):
    assert lessonbook.build(source).passed
    assert lessonbook.run_and_compare(source).passed

    stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert "execution" not in str(stored.cells[1].metadata), "stored notebooks hold no timings"

    copy = source.parent / "student.ipynb"
    copy.write_text(nbformat.writes(lessonbook.student_copy(source)))
    assert "2 * x" not in copy.read_text()
    ((title, passed, why),) = lessonbook.grade(copy, source, source.parent)
    assert title == "Exercise 1: double" and not passed and "your turn" in why

    copy.write_text(copy.read_text().replace('raise NotImplementedError(\\"your turn\\")', "return x + x"))
    ((_, passed, why),) = lessonbook.grade(copy, source, source.parent)
    assert passed, why

    copy.write_text(copy.read_text().replace("return x + x", "return 0").replace("== 6", "== 0"))
    ((_, passed, why),) = lessonbook.grade(copy, source, source.parent)
    assert not passed and "3 doubled is 6" in why, "an edited check must not count"


@pytest.mark.slow
def test_a_notebook_that_prints_something_else_is_found(source: Path):
    lessonbook.build(source)
    notebook = source.with_suffix(".ipynb")
    notebook.write_text(notebook.read_text().replace("two: 2", "two: 3"))
    (problem,) = lessonbook.run_and_compare(source).problems
    assert "two: 2" in problem and "two: 3" in problem
    source.write_text(LESSON.replace("1 + 1", "1 + 2"))
    (problem,) = lessonbook.run_and_compare(source).problems
    assert "older than the source" in problem


@pytest.mark.slow
def test_a_lesson_that_fails_says_where(source: Path):
    source.write_text(LESSON.replace('print("two:", 1 + 1)', "raise ValueError('broken here')"))
    (problem,) = lessonbook.run_and_compare(source).problems
    assert "broken here" in problem


def test_unknown_lessons_and_folders_are_named(source: Path):
    with pytest.raises(ValueError, match="no lesson '7'; there are 90_small"):
        lessonbook.find_sources(source.parent, ["7"])
    with pytest.raises(FileNotFoundError, match="no lessons in"):
        lessonbook.find_sources(source.parent / "nowhere", [])
    assert lessonbook.find_sources(source.parent, ["90"]) == [source]


LESSONS = Path(__file__).parents[2] / "lessons"


@pytest.mark.parametrize("path", sorted(LESSONS.glob("[0-9][0-9]_*.py")), ids=lambda p: p.stem)
def test_every_lesson_has_exercises_with_checks_and_its_student_copy_holds_no_solution(path: Path):
    full, copy = lessonbook.read_source(path), lessonbook.student_copy(path)
    solutions = [
        line.strip()
        for cell in full.cells
        for match in lessonbook.SOLUTION.finditer(cell.source + "\n")
        for line in match.group(2).splitlines()
        if len(line.strip()) > 12
    ]
    shown = [lessonbook.SOLUTION.sub("", cell.source + "\n") for cell in full.cells]  # what a student may read anyway
    hidden = [line for line in solutions if not any(line in source for source in shown)]
    checks = [cell for cell in full.cells if "check" in cell.metadata.get("tags", [])]
    assert checks and len(hidden) > len(solutions) / 2
    assert all(cell.source.startswith("# Exercise") for cell in checks)
    stubs = [cell for cell in copy.cells if lessonbook.STUB.strip() in cell.source]
    assert len(stubs) >= len(checks)
    for line in hidden:
        assert not any(cell.cell_type == "code" and line in cell.source for cell in copy.cells), line


@pytest.mark.parametrize("path", sorted(LESSONS.glob("[0-9][0-9]_*.py")), ids=lambda p: p.stem)
def test_every_lesson_has_a_notebook_of_the_same_source(path: Path):
    stored = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [cell.source for cell in stored.cells] == [cell.source for cell in lessonbook.read_source(path).cells]
    assert stored == lessonbook.tidy(deepcopy(stored)), "stored outputs are not tidy: build the lesson again"


def test_a_print_that_arrived_in_pieces_is_stored_whole():
    """Neighbouring pieces are shown as paragraphs of their own, and where they part depends on how busy the machine is."""
    piece = nbformat.v4.new_output
    picture = piece("display_data", {"image/png": "iVBOR", "text/plain": "<Figure>"})
    outputs = [piece("stream", text="likelihood "), piece("stream", name="stderr", text="warning"),
               piece("stream", text="0.5\n"), picture, piece("stream", text="right\n")]  # fmt: skip
    cell = nbformat.v4.new_code_cell(outputs=outputs)
    lessonbook.tidy(nbformat.v4.new_notebook(cells=[cell]))
    assert [output.get("text") for output in cell.outputs] == ["likelihood 0.5\n", None, "right\n"]
    assert cell.outputs[1].data == {"image/png": "iVBOR"}
