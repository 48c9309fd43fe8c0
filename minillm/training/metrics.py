r"""Metrics as JSON lines: one object a line, appended as training goes."""

import json
import math
import os
from pathlib import Path
from typing import Any

from minillm.data.files import write_atomically


class MetricsLog:
    """A file of JSON lines. A line is written by one call to the system, so a reader never meets half of one.

    What a killed run has written after its last checkpoint is dropped when the run goes on: see `rewind`.
    """

    def __init__(self, path: str | os.PathLike | None):
        self.path = None if path is None else Path(path)

    def append(self, **metrics: Any) -> None:
        """Write one line; numbers that JSON does not have (NaN, infinity) become null."""
        if self.path is None:
            return
        line = json.dumps({key: _plain(value) for key, value in metrics.items()}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode("utf-8"))
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """All complete lines."""
        if self.path is None or not self.path.exists():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # cut off by a power cut
                continue
        return [line for line in lines if isinstance(line, dict)]

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after ``step``."""
        if self.path is None or not self.path.exists():
            return
        kept = [line for line in self.read() if line.get("step", 0) <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode("utf-8"))


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
