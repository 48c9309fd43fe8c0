r"""Checkpoints: one safetensors file with everything that a run needs to go on.

Tensors are named ``model.*`` and ``optimizer.*``; all else (step, configuration, tokenizer, position in the data with
its generator, versions) is one JSON text in the file's metadata. No pickle, so reading a file runs nothing. A
checksum covers tensors and record. A file gets its name only when every byte of it is on disk.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minillm.checks import message, require
from minillm.data.files import write_atomically

FORMAT = "minillm checkpoint 1"
LARGEST_HEADER = 100_000_000  # bytes; what safetensors itself allows
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: arrays by name, and a record of plain data."""

    tensors: dict[str, np.ndarray]
    record: dict[str, Any]

    def part(self, name: str) -> dict[str, np.ndarray]:
        """The tensors below a name, say "model" or "optimizer", without it."""
        return {k.removeprefix(f"{name}."): v for k, v in self.tensors.items() if k.startswith(f"{name}.")}


def write_checkpoint(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Write a checkpoint beside ``path`` and rename it when it is complete.

    A crash at any moment, of the process or of the machine, leaves the old file or the new one.
    """
    path = Path(path)
    tensors = {name: np.ascontiguousarray(array) for name, array in checkpoint.tensors.items()}
    tensors = {name: array.reshape(checkpoint.tensors[name].shape) for name, array in tensors.items()}
    record = json.dumps(checkpoint.record)
    metadata = {"format": FORMAT, "record": record, "sha256": _checksum(tensors, record)}
    write_atomically(path, save(tensors, metadata))
    _sync_folder(path.parent)


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises: FileNotFoundError if there is none; ValueError if the file is truncated, damaged or something else. A
        length that the file cannot have is refused before anything of that size is read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(message("read_checkpoint", "the path", "a checkpoint file", f"{path}, which is none"))
    _check_header_length(path)
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            _refuse_unless(metadata.get("format") == FORMAT, path, "a safetensors file from elsewhere")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        record = metadata.get("record", "")
        _refuse_unless(metadata.get("sha256") == _checksum(tensors, record), path, "one whose checksum is wrong")
        contents = json.loads(record)
    except (SafetensorError, TypeError, AttributeError, KeyError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(_bad_file(path, f"a damaged one ({error})")) from error
    _refuse_unless(isinstance(contents, dict), path, "one without a record")
    return Checkpoint(tensors, contents)


def checkpoint_path(folder: str | os.PathLike, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return Path(folder) / f"checkpoint-{step:08d}.safetensors"


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))  # type: ignore[index]


def latest_checkpoint(path: str | os.PathLike) -> Path:
    """The newest checkpoint of a run's folder; a path to a file is returned as it is.

    Raises: FileNotFoundError if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = checkpoints_in(path)
    if not found:
        wanted = "a checkpoint, or the folder of a run that has saved one"
        received = f"{path}, {'a folder without any' if path.is_dir() else 'which does not exist'}"
        raise FileNotFoundError(message("latest_checkpoint", "the path", wanted, received))
    return found[-1]


def keep_newest(folder: str | os.PathLike, keep: int) -> None:
    """Remove all but the newest checkpoints, and what a killed writer has left behind."""
    require(keep >= 1, "keep_newest", "keep", "at least 1", keep)
    for path in checkpoints_in(folder)[:-keep]:
        path.unlink()
    for path in Path(folder).glob(".checkpoint-*.partial"):
        path.unlink(missing_ok=True)


def _check_header_length(path: Path) -> None:
    size = path.stat().st_size
    _refuse_unless(size >= 8, path, f"one of {size} bytes")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    fits = header <= min(size - 8, LARGEST_HEADER)
    _refuse_unless(fits, path, f"one of {size} bytes whose header claims {header} (cut off, or no safetensors file)")


def _checksum(tensors: Mapping[str, np.ndarray], record: str) -> str:
    digest = hashlib.sha256(record.encode("utf-8"))
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _refuse_unless(condition: bool, path: Path, received: str) -> None:
    if not condition:
        raise ValueError(_bad_file(path, received))


def _bad_file(path: Path, received: str) -> str:
    before = [other for other in checkpoints_in(path.parent) if other.name < path.name]
    hint = f"The one before it is {before[-1]}." if before else ""
    return message("read_checkpoint", f"the file {path}", "a complete minillm checkpoint", received, hint)


def _sync_folder(folder: Path) -> None:
    """Make a renaming survive a power cut, where the system lets folders be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
