"""The subtly wrong kernels of `lessons/kernels_to_break`: each is caught, its picture is drawn, the right one passes."""

import re
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from kernels import compare, figure, registry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")
FOLDER = Path(__file__).parents[2] / "lessons" / "kernels_to_break"
ROWS = re.findall(r"^\| `(\w+)\.py` \| `(\w+)` \| (.*) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
FAMILY = {file: next(f for f in registry.FAMILIES if file.startswith(f)) for file, *_ in ROWS
          if file.startswith(tuple(registry.FAMILIES))}  # fmt: skip
WRONG = [(file, name) for file, name, what in ROWS if not what.startswith("nothing") and file in FAMILY]


def test_every_file_is_in_the_table():
    assert {file for file, *_ in ROWS} | {"attention_frame"} == {path.stem for path in FOLDER.glob("*.py")}


def test_every_command_names_its_own_file():
    for file, name, _ in ROWS:
        text = (FOLDER / f"{file}.py").read_text()
        assert f"--impl lessons/kernels_to_break/{file}.py:{name}\n" in text, file


FAST = ("attention_last_block", "attention_no_rescale", "activations_padded_offset", "norm_last_block")


@pytest.mark.parametrize(
    ("file", "name"),
    [pytest.param(*row, id=row[0], marks=[] if row[0] in FAST else pytest.mark.slow) for row in WRONG],
)
def test_it_is_caught_and_shown(file, name, tmp_path):
    family = FAMILY[file]
    subject = compare.reader_subject(family, f"{FOLDER}/{file}.py:{name}")
    assert not subject.differentiable
    found = compare.compare(
        family, subject, examples=25, number=0, properties=("reference",), dtypes=("float32",)
    )  # fmt: skip
    (outcome,) = (o for o in found if not o.passed)
    assert outcome.verdict.ratio > 1 and not outcome.error
    path = tmp_path / "picture.png"
    assert str(path) in figure.draw(family, subject, found, str(path))
    assert imread(path).shape[1] > 2000, "two cases stand beside the properties"


def test_the_right_one_passes():
    subject = compare.reader_subject("attention", f"{FOLDER}/attention_right.py:attention")
    outcomes = compare.compare("attention", subject, examples=6, number=0, dtypes=("float32",))
    assert outcomes
    assert all(o.passed for o in outcomes), compare.report([o for o in outcomes if not o.passed])
