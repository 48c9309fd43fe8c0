"""What a command prints on standard output: one JSON array for programs, or an aligned table for people."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Rows = Iterable[Mapping[str, Any]]


def plain(value: Any) -> Any:
    """Turn a value into what JSON knows: NumPy scalars and arrays unpacked, NaN and infinities to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # a NumPy scalar or array
        return plain(value.tolist())
    return str(value)


def print_json(rows: Rows) -> None:
    """Print the rows as one JSON array of objects, and nothing else."""
    print(json.dumps([plain(row) for row in rows], indent=1, allow_nan=False))


def print_table(rows: Rows, columns: Sequence[str]) -> None:
    """Print the chosen columns of the rows: numbers to the right, text to the left, "-" where there is nothing."""
    rows = list(rows)
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    right = [
        any(_is_number(row.get(column)) for row in rows)
        and all(_is_number(row.get(column)) or row.get(column) is None for row in rows)
        for column in columns
    ]
    for line in [list(columns), *cells]:
        padded = [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ]
        print("  ".join(padded).rstrip())


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or "-"
    if hasattr(value, "is_integer") and _is_number(value):  # a float of Python or NumPy
        return f"{float(value):.4g}"
    return str(value)
