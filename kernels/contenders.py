"""What a family's benchmark is made of: cases, and the peers that run here and compute the same.

A peer is somebody else's code on somebody's machine: whatever it does, it costs its own row and no other.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

AGREE = 2e-2  # how far a peer's results may be from ours, as a share of their size: bf16 rounds to 4e-3


@dataclass(frozen=True)
class Case:
    """One thing to time: calls without arguments by contender (``ours`` among them), and what must move or be computed.

    ``flush`` empties the cache before each call: right where memory is the bound, a waste where products are.
    ``line`` and ``size`` are for the figures over size: cases of one line differ in their size alone.
    """

    name: str
    dtype: str
    bytes: int
    contenders: Mapping[str, Callable[[], Any]]
    flops: int = 0
    flush: bool = True
    line: str = ""
    size: int = 0


def runnable(case: Case, clock: Any, say: Callable[[str], None]) -> dict[str, Callable[[], Any]]:
    """The contenders that get through a first call (which compiles them); without ours there is no case."""
    found = {}
    for name, call in case.contenders.items():
        try:
            clock.times(call, 1)
        except Exception as error:
            if name == "ours":
                raise
            say(f"{name} {case.name}: left out ({brief(error)})")
            continue
        found[name] = call
    return found


def prepared(
    makers: Mapping[str, Callable[[], Callable[[], Any]]], say: Callable[[str], None], what: str
) -> dict[str, Callable[[], Any]]:
    """The calls that can be made ready (a backward needs its forward first); without ours there is no case."""
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            if name == "ours":
                raise
            say(f"{name} {what}: left out ({brief(error)})")
    return found


def alike(found: Any, wanted: Any) -> bool:
    """Whether a peer computes what we do: of the same shapes, and apart by a small share of their size."""
    a, b = ([t for t in (r if isinstance(r, tuple | list) else (r,)) if t is not None] for r in (found, wanted))
    return len(a) == len(b) and all(x.shape == y.shape and _near(x.float(), y.float()) for x, y in zip(a, b))


def _near(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((x - y).norm() <= AGREE * y.norm() + 1e-6)


def brief(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:100]}"


def made(cases: Iterator[Case], what: str) -> Iterator[Case]:
    """Cases that are made one by one. Where making one fails, a case comes instead that fails with the same error when it
    is called, and those behind it are left out: what other shapes there are can still be measured."""
    try:
        yield from cases
    except Exception as error:
        yield Case(what, "", 0, {"ours": partial(_fail, brief(error))})


def _fail(text: str) -> None:
    raise RuntimeError(f"could not be made: {text}") from None
