"""The kernel families by name: every folder here with a `family.py`. Loading one imports triton; this module does not."""

import importlib
from pathlib import Path
from types import ModuleType

FAMILIES = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/family.py")))


def load(family: str) -> ModuleType:
    """A family's `family.py`: functions, references, properties."""
    return importlib.import_module(f"kernels.{family}.family")


def load_part(family: str, part: str) -> ModuleType:
    """Another module of a family: ``builds`` for ahead-of-time compilation, ``benchmark`` for timing, ``witness`` for exact answers."""
    return importlib.import_module(f"kernels.{family}.{part}")
