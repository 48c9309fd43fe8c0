"""Validation and error messages, in one place.

Every public boundary refuses bad input with one sentence of one form:
``<where>: <what> must be <wanted>, got <received>. <what to do>``.
"""

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class MissingPackageError(ImportError):
    """An optional package is needed and not installed; the message says which extra brings it."""


def describe(value: Any) -> str:
    """Say in a few words what a received value is: shape and dtype for arrays, else a short repr."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"shape {tuple(value.shape)} of {value.dtype}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def message(where: str, what: str, wanted: str, received: Any, hint: str = "") -> str:
    """Compose the one-sentence error message of the house."""
    received = received if isinstance(received, str) else describe(received)
    return f"{where}: {what} must be {wanted}, got {received}." + (f" {hint}" if hint else "")


def require(
    condition: bool,
    where: str,
    what: str,
    wanted: str,
    received: Any,
    hint: str = "",
    error: type[Exception] = ValueError,
) -> None:
    """Raise ``error`` with the house's message unless ``condition`` holds."""
    if not condition:
        raise error(message(where, what, wanted, received, hint))


def require_one_of(value: Any, allowed: Iterable[Any], where: str, what: str) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``, listing them."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(message(where, what, "one of " + ", ".join(map(repr, allowed)), value))


def require_positive(value: Any, where: str, what: str, *, integer: bool = False, zero_ok: bool = False) -> None:
    """Raise unless ``value`` is a positive number (an integer if asked; zero allowed if asked)."""
    kind = "integer" if integer else "number"
    wanted = f"a {'non-negative' if zero_ok else 'positive'} {kind}"
    is_number = isinstance(value, int | float) or (hasattr(value, "__float__") and not getattr(value, "ndim", 0))
    fits = is_number and not isinstance(value, bool) and value == value and (value > 0 or (zero_ok and value == 0))
    if integer:
        fits = fits and int(value) == value
    require(bool(fits), where, what, wanted, value)


def optional_import(name: str, extra: str) -> ModuleType:
    """Import an optional third-party package or say in one line how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"this needs the package '{name}', which cannot be imported ({error}). "
            f"Install it with: pip install '.[{extra}]' in the project's folder (or run `make test`, which sets it up)."
        ) from error
