"""Writing files so that a reader never meets half of one."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from minillm.checks import message


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replace ``path`` by ``content`` only once every byte of it is on disk.

    The bytes go to a temporary file beside the target and are renamed over it; a crash at any moment leaves
    either the old file or the new one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # one for each writer
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_atomically(path, (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8"))


def read_json(path: str | os.PathLike, where: str) -> Any:
    """Read JSON, or say which file is not JSON.

    Raises: FileNotFoundError if there is no such file, ValueError if it is not complete UTF-8 JSON.
    """
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of both the decoding and the JSON; nested without end
        raise ValueError(
            message(where, f"the file {path}", "complete JSON in UTF-8", str(error), "Write it again with save().")
        ) from error
