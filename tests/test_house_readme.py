"""What the README says of names and commands is so."""

import importlib
import re
from pathlib import Path

import pytest

from minillm import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = re.findall(r"^\| `(torch\.[\w.]+)` \| `([\w.]+)` \|", README, re.MULTILINE)


def resolve(dotted: str):
    """The object behind a dotted name: the longest prefix that is a module, then attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no such module: {dotted}")


def test_the_table_of_torch_names_is_read():
    assert len(NAMES) > 25


@pytest.mark.parametrize(("theirs", "ours"), NAMES)
def test_both_names_of_a_row_exist(theirs, ours):
    assert resolve(theirs) is not None
    assert resolve(f"minillm.{ours}") is not None


def test_every_command_of_minillm_is_in_the_table():
    told = set(re.findall(r"`minillm (\w+)", README))
    assert told >= cli.available().keys()
    assert told <= cli.COMMANDS.keys()


def test_every_target_of_make_that_is_told_exists():
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = set(re.findall(r"(?:`|^)make ([a-z0-9]+)", pages, re.MULTILINE))
    assert told >= {"tour", "test", "lessons"}
    assert told <= targets


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_pictures_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in targets if not (ROOT / link).exists()]
    assert not missing
