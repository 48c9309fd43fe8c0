"""The registry: one row per function, naming its forms, so that no form can go unchecked.

A row holds up to three callables of the same mathematical function:

* ``primitive``: an entry of the primitive table (its own VJP is what is checked), or
* ``written``: composed of primitives, gradient from the engine, and
* ``derived``: fused, with a hand-derived VJP,

and an ``example``: a function from a ``numpy.random.Generator`` to ``(args, kwargs)`` that draws inputs,
shapes included, at which the function is smooth. `minillm gradcheck` and the tests walk the rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Example = Callable[[np.random.Generator], tuple[tuple, dict]]


@dataclass
class Row:
    """One function of the project: its name, its forms and how to draw an example of its inputs."""

    name: str
    primitive: Any = None
    written: Callable | None = None
    derived: Any = None
    example: Example | None = None

    @property
    def forms(self) -> dict[str, Callable]:
        """The callables to check, by the name of their kind."""
        kinds = {"primitive": self.primitive, "written": self.written, "derived": self.derived}
        return {kind: form for kind, form in kinds.items() if form is not None}


_rows: dict[str, Row] = {}


def register(name: str, **fields: Any) -> Row:
    """Create or complete the row ``name``; a field that is already set cannot be set again."""
    entry = _rows.setdefault(name, Row(name))
    for field, value in fields.items():
        if getattr(entry, field) is not None:
            raise ValueError(f"registry: '{name}' already has a {field} form; names must be distinct.")
        setattr(entry, field, value)
    return entry


def written(name: str, example: Example | None = None) -> Callable[[Callable], Callable]:
    """Enter a function as the as-written form of ``name``, with the example its checks draw from."""

    def enter(function: Callable) -> Callable:
        register(name, written=function, **({"example": example} if example else {}))
        return function

    return enter


def row(name: str) -> Row:
    """Look up a row, or say which names are close."""
    if name not in _rows:
        raise KeyError(f"registry: no function called '{name}'")
    return _rows[name]


def rows() -> Iterator[Row]:
    """All rows in order of registration."""
    return iter(list(_rows.values()))
