"""Holds the annotations of minillm, shapes included, to every call that the tests make.

A call is checked after it has returned: arguments and result together, so that one size name means one size
throughout. A call that does not fit its annotations must therefore either be refused by the function itself,
with its own clear error (which the tests of errors then see), or it is a mistake that shows up here.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxtyping import config, install_import_hook

from minillm.checks import optional_import

# Everything but the tape: its methods run a hundred times for one call of the rest and carry no shapes.
CHECKED = [
    f"minillm.{package}"
    for package in ("data", "functional", "optim", "fused", "nn", "models", "decoding", "training", "alignment")
]

_checkers: list[Callable] = []  # beartype's decorator, once it is wanted


def check_after_the_call(stub: Callable) -> Callable:
    """Let beartype check the second of the two stand-ins that jaxtyping makes of a function.

    The first has the function's own parameters and is called before it; the second takes the result as one
    more keyword and is called after it, with arguments and result.
    """
    parameters = inspect.signature(stub).parameters.values()
    takes_result = any(p.kind is p.KEYWORD_ONLY and re.fullmatch(r"ret\d+", p.name) for p in parameters)
    return _checkers[0](stub) if takes_result else stub


@contextmanager
def suspended() -> Iterator[None]:
    """No checks inside: for long runs of calls whose like others make under them, where a check costs more than a call."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


def install() -> None:
    """Instrument what is imported from now on; MINILLM_TYPECHECK=0 in the environment switches it off, and beartype
    need not be there then (a machine with a GPU that is only lent may not have it)."""
    if os.environ.get("MINILLM_TYPECHECK", "1") != "0":
        beartype = optional_import("beartype", "dev")
        conf = beartype.BeartypeConf(is_pep484_tower=True)  # an int is fine where a float is wanted
        _checkers[:] = [beartype.beartype(conf=conf)]
        install_import_hook(CHECKED, "tests.typecheck.check_after_the_call")
