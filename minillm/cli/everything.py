"""All registered functions, with every module that registers some loaded."""

import importlib
import pkgutil

import minillm.functional
import minillm.fused
from minillm.autograd.registry import Row, rows


def registered_rows() -> list[Row]:
    """Load all of `minillm.functional` and `minillm.fused` and return the registry's rows, by order of entry."""
    for package in (minillm.functional, minillm.fused):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    return list(rows())
