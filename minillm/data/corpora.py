"""Text to train on that needs no network, and how it is divided."""

import importlib
import os
import warnings
from pathlib import Path
from typing import TypeVar

import numpy as np

from minillm.checks import message, require

Data = TypeVar("Data", str, bytes, list, tuple, np.ndarray)


def python_docs() -> list[str]:
    """The English pages of reference that ship in every CPython (``pydoc_data.topics``), in sorted order.

    Raises: FileNotFoundError where a trimmed Python was installed without them.
    """
    try:  # by name, as data: half a megabyte of text that is only read when somebody wants it
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        hint = "Install the full standard library, or give a text file of your own to load_text."
        raise FileNotFoundError(
            message("python_docs", "pydoc_data", "part of this Python", f"none ({error})", hint)
        ) from error
    return [topics[name] for name in sorted(topics)]


def python_docs_text() -> str:
    """The same pages as one text of about 466,000 characters (the exact text depends on the Python version)."""
    return "\n".join(python_docs())


def load_documents(path: str | os.PathLike, pattern: str = "*") -> list[str]:
    """Read a text file, or every text file below a folder in sorted order; one string a file.

    In a folder, hidden files and folders and names that ``pattern`` does not match are left out; files that are not
    text are skipped with one warning that says how many and names the first.

    Raises: FileNotFoundError if there is nothing at ``path``; ValueError for a file that is empty, binary or not UTF-8,
        and for a folder without text.
    """
    where, path = "load_documents", Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(message(where, "path", "an existing file or folder", str(path), "Check the spelling."))
    if path.is_file():
        return [_read_text(path)]
    documents, refused = [], []
    for file in _visible_files(path, pattern):
        try:
            documents.append(_read_text(file))
        except ValueError as error:
            refused.append(str(error))
    if refused:
        warnings.warn(f"{where}: skipped {len(refused)} file(s) below {path}; the first: {refused[0]}", stacklevel=2)
    hint = "Name a folder that holds UTF-8 text files, or a file."
    require(len(documents) > 0, where, f"the folder {path}", f"one with text files matching {pattern!r}", "none", hint)
    return documents


def load_text(path: str | os.PathLike, pattern: str = "*") -> str:
    """Read a text file, or all text files below a folder joined by line breaks (see :func:`load_documents`)."""
    return "\n".join(load_documents(path, pattern))


def _visible_files(folder: Path, pattern: str) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(parent, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.match(pattern) and file.is_file()]
    return sorted(found)


def _read_text(path: Path) -> str:
    where, what, hint = "load_text", f"the file {path}", "Convert it to UTF-8 text first."
    data = path.read_bytes()
    require(len(data.strip()) > 0, where, what, "text", "an empty file" if not data else "white space only")
    require(b"\0" not in data, where, what, "text", f"a binary file (zero byte at {data.find(bytes(1))})", hint)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        received = f"byte 0x{data[error.start]:02x} at {error.start}, which is not UTF-8"
        raise ValueError(message(where, what, "text in UTF-8", received, hint)) from error


def split_held_out(data: Data, share: float = 0.1) -> tuple[Data, Data]:
    """Divide a text or a sequence into its beginning, to train on, and its last ``share``, to be held out.

    Train tokenizers on the first part only. Raises: ValueError if one of the parts would be empty.
    """
    where = "split_held_out"
    require(0 < share < 1, where, "share", "between 0 and 1", share)
    cut = len(data) - round(len(data) * share)
    require(0 < cut < len(data), where, "data", "long enough for two parts", f"length {len(data)} with share {share}")
    return data[:cut], data[cut:]
