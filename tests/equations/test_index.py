"""The scan of a tree, on small trees made here, and the command on the real one."""

import json
from pathlib import Path

import pytest

from minillm.cli import main
from minillm.equations import build_index, check, missing
from minillm.equations.index import REFRESH, STORED, IndexRow, checkout_root, stored_form

CODE = '''
r"""A module.

Equation: `softmax` $p$
"""

def one(x):
    """Short.

    Equation: `logsumexp` $l$
    Equation: `log-softmax` $q$
    """

class Two:
    """Class.

    Equation: `gemm` $D$
    """

    async def three(self):
        """Method. Not a line: see `relu`.

        Equation: `no-such-id` $?$
        """

four = primitive("four", f, doc=r"""Four.

Equation: `sigmoid` $s$
""")
'''
TESTS = """
import pytest
pytestmark = [pytest.mark.equation("softmax")]

@pytest.mark.equation("gemm", "logsumexp")
@pytest.mark.parametrize("x", [1])
def test_a(x): ...

@pytest.mark.equation("log-softmax")
class TestB:
    def test_c(self): ...
    def helper(self): ...

def not_a_test(): ...
"""
LESSON = "# %% [markdown]\n# About `softmax` and `x_hat` and `gemm`.\n\n# %%\nprint('`relu`')\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in {
        "minillm/module.py": CODE,
        "kernels/__init__.py": '"""K.\n\nEquation: `gemm` $D$\n"""\n',
        "tests/deep/test_it.py": TESTS,
        "lessons/07_it.py": LESSON,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_scan_finds_code_kernels_tests_and_lessons(tree):
    rows, strangers = build_index(tree)
    index = {row.id: row for row in rows}
    assert index["softmax"].code == ["minillm.module"]
    assert index["logsumexp"].code == index["log-softmax"].code == ["minillm.module:one"]
    assert index["gemm"].code == ["minillm.module:Two"] and index["gemm"].kernel == ["kernels"]
    assert index["sigmoid"].code == ["minillm.module:four"]
    assert index["relu"].code == [] and index["relu"].lessons == []
    where = "tests/deep/test_it.py::"
    assert index["softmax"].tests == [where + "TestB::test_c", where + "test_a"]
    assert index["log-softmax"].tests == [where + "TestB::test_c"]
    assert index["gemm"].lessons == ["07_it"]
    assert [(p.id, "minillm.module:Two.three" in p.text) for p in strangers] == [("no-such-id", True)]


def test_check_and_missing_say_what_is_wrong(tree):
    rows, strangers = build_index(tree)
    texts = {problem.id: problem.text for problem in check(rows, strangers)}
    assert texts.keys() == {"sigmoid", "no-such-id"}
    assert "no test" in texts["sigmoid"]
    lacking = {problem.id for problem in missing(rows, [1])}
    assert "row-decomposition" in lacking and "softmax" not in lacking
    row = IndexRow("x", "row", 1, "X", "x", "s", tests=["t"])
    worked = IndexRow("wn-x", "worked", 1, "X", "x", "s", tests=["t"])
    assert [p.id for p in check([row, worked])] == ["x"]
    assert [p.id for p in missing([row, worked], [1])] == ["x"]
    with pytest.raises(ValueError, match=r"the sections must be in 1\.\.26"):
        missing(rows, [1, 99])


def test_the_real_tree_has_nothing_to_object_to_and_section_1_is_complete(capsys):
    assert main(["equations", "--check", "--complete", "1"]) == 0, capsys.readouterr().err


def test_the_stored_index_is_fresh():
    root = checkout_root()
    assert root is not None
    rows, _ = build_index(root)
    assert STORED.read_text(encoding="utf-8") == stored_form(rows), f"run: {REFRESH}"


def test_json_is_one_array_with_the_fields_that_others_read(capsys):
    assert main(["equations", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 575
    fields = {"id", "kind", "section", "name", "latex", "source", "code", "kernel", "tests", "lessons"}
    assert all(row.keys() == fields for row in rows)
    rmsnorm = next(row for row in rows if row["id"] == "rmsnorm")
    assert "minillm.functional.norms:rms_norm" in rmsnorm["code"] and "kernels.norm.op:rms_norm" in rmsnorm["kernel"]
    assert "03_rmsnorm_three_times" in rmsnorm["lessons"]


def test_a_failed_check_still_prints_the_array(capsys):
    assert main(["equations", "--complete", "25", "--json"]) == 1
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 575
    assert "equations: ddp is missing" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["equations", "rmsnrm"], "no equation 'rmsnrm'. Close: rmsnorm"),
        (["equations", "--section", "99"], "no section 99"),
        (["equations", "--complete", "one"], "sections as in 1,2,3"),
        (["equations", "--complete", "99"], "the sections must be in 1..26"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and words in captured.err


def test_one_entry_in_full(capsys):
    assert main(["equations", "layernorm"]) == 0
    text = capsys.readouterr().out
    assert "LayerNorm" in text and "errata" in text and "minillm.fused.norms:layer_norm" in text
