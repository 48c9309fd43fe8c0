"""The kernel families by name. Loading one imports triton; this module does not."""

import importlib
from types import ModuleType

FAMILIES = ("norm",)


def load(family: str) -> ModuleType:
    """A family's `family.py`: functions, references, properties."""
    return importlib.import_module(f"kernels.{family}.family")


def load_part(family: str, part: str) -> ModuleType:
    """Another module of a family: ``builds`` for ahead-of-time compilation, ``benchmark`` for timing, ``witness`` for exact answers."""
    return importlib.import_module(f"kernels.{family}.{part}")
