"""The catalogue: every equation and worked number that has to exist, as data."""

import json
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("catalogue.json")


@dataclass(frozen=True)
class Entry:
    """One id of the catalogue.

    ``kind`` is ``row`` for an equation and ``worked`` for a figure of the sources to be checked. ``in_source`` says how
    the source has it: ``formula``, ``named``, ``heading``, ``companion`` (not at all) or ``figure``. ``errata`` numbers
    the corrections that its formula contains.
    """

    id: str
    kind: str
    section: int
    section_title: str
    name: str
    latex: str
    source: str
    in_source: str
    errata: tuple[int, ...]


def load_catalogue() -> dict[str, Entry]:
    """All entries by id, in the order of the catalogue."""
    records = json.loads(PATH.read_text(encoding="utf-8"))
    return {record["id"]: Entry(**{**record, "errata": tuple(record["errata"])}) for record in records}
