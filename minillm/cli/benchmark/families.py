"""What `minillm bench` can measure: families of cases, each with its sides.

A family is a module with ``FAMILY``. A side is a context manager ``side(case, threads)`` that yields a step: a function
without arguments that does the work once and returns a number. "ours" must be there; "torch" is the peer, "floor" the
least that any implementation has to do.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

Step = Callable[[], float]
MakeStep = Callable[[Any, int], AbstractContextManager[Step]]


class Case(Protocol):
    """What all cases have: a name within the family, and how many steps one turn times."""

    @property
    def name(self) -> str:
        """The case's name on the command line, after the family's."""
        ...

    @property
    def steps(self) -> int:
        """Timed steps of one turn."""
        ...


@dataclass(frozen=True)
class Family:
    """Cases of one kind and the functions that set their sides up."""

    name: str
    about: str
    cases: Mapping[str, Any]
    sides: Mapping[str, MakeStep]
    peer: str = "torch eager"
    peer_side: str = "torch"  # which of the sides that is
    columns: Callable[[Any, dict[str, float]], dict[str, Any]] = field(default=lambda case, median: {})  # more of a row
    same_answer: bool = False  # whether a step of the peer must return what ours does, to the last digit
    missing: Callable[[], str | None] = field(default=lambda: None)  # what this family needs and does not find here
