"""The catalogue as data: complete, well-formed."""

import re

import pytest

from minillm.equations import load_catalogue

CATALOGUE = load_catalogue()


def test_it_holds_all_rows_and_worked_numbers_with_unique_kebab_case_ids():
    kinds = [entry.kind for entry in CATALOGUE.values()]
    assert (kinds.count("row"), kinds.count("worked")) == (514, 61)
    assert all(re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", id_) for id_ in CATALOGUE)
    assert all((entry.kind == "worked") == id_.startswith("wn-") for id_, entry in CATALOGUE.items())


def test_names_are_short_and_distinct():
    names = [entry.name for entry in CATALOGUE.values()]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 60 and min(map(len, names)) >= 2


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE.keys())
def test_every_entry_is_filled_in_and_its_braces_balance(entry):
    assert entry.latex.strip() and entry.source.strip() and entry.section_title
    assert 1 <= entry.section <= 26
    depth = 0
    for character in re.sub(r"\\[{}]", "", entry.latex):
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0, entry.latex
    assert depth == 0, entry.latex
    assert "$" not in entry.latex
    assert entry.in_source in {"formula", "named", "heading", "companion", "figure"}
