"""Whole output folders: built beside their final place and moved there at the end, so none is ever half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megavl.config.errors import StorageError, UsageError

DESCRIPTION = "corpus.json"
"""Description of a finished corpus; its presence marks a folder that this program made."""

_MARKS = (DESCRIPTION, "tokenizer.json")


@contextmanager
def new_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends well, and vanishes otherwise.

    Args:
        path: the final folder; must be absent or empty, unless `force` is set.
        force: replace an earlier result; only a folder that holds `corpus.json` or `tokenizer.json` is ever removed.

    Raises:
        UsageError: when the final folder is taken.
        StorageError: when a folder or file cannot be written.
    """
    path = Path(os.path.abspath(path))
    _check_free(path, force=force)
    building = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        building.mkdir(parents=True)
        yield building
        _publish(building, path)
    except OSError as error:
        raise StorageError(
            f"--output {path}: cannot write {error.filename or path} ({error.strerror}); "
            "free some space or choose a writable folder"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_free(path: Path, *, force: bool) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"--output {path}: exists and is not a folder; choose another path")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not force:
        raise UsageError(f"--output {path}: the folder is not empty; choose another, or replace it with --force")
    if not any((path / mark).is_file() for mark in _MARKS):
        raise UsageError(
            f"--output {path}: --force replaces earlier results only, and this folder holds none of "
            f"{', '.join(_MARKS)}; choose another folder or empty this one yourself"
        )


def _publish(building: Path, path: Path) -> None:
    """Put the finished folder in place; an earlier result is removed only after that."""
    earlier = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    if path.exists():
        path.rename(earlier)
    try:
        building.rename(path)
    except OSError:
        if earlier.exists():
            earlier.rename(path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line in UTF-8; returns the number of lines."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            write_line(file, record)
            count += 1
    return count


def write_line(file: TextIO, record: Mapping[str, Any]) -> None:
    """Write one record of a JSONL file."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in UTF-8."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
