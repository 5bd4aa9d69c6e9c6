"""Output folders that appear complete or not at all: built under a temporary name and renamed at the end."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from megavl.config.errors import StorageError, UsageError
from megavl.files.durable import sync_directory, sync_tree
from megavl.files.new_folder import work_folder

DESCRIPTION = "corpus.json"
"""Description of a finished corpus; a folder with this file was made by this program."""

_MARKS = (DESCRIPTION, "tokenizer.json")


@contextmanager
def new_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` when the block succeeds, and removed when it fails.

    It lies in `.NAME.partial` beside `path`, which this process owns meanwhile.

    Args:
        path: final folder; must be absent or empty, unless `force` is set.
        force: replace an earlier result. Only a folder that holds `corpus.json` or `tokenizer.json` is ever removed.

    Raises:
        UsageError: the final folder is not free, or another process makes it.
        StorageError: a folder or file cannot be written.
    """
    path = Path(os.path.abspath(path))
    _check_free(path, force=force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(path, name="--output") as (work, held):
            # Another process may have made it before this one became the owner.
            _check_free(path, force=force)
            building = work / "new"
            building.mkdir()
            yield building
            sync_tree(building)
            held.confirm()
            _check_free(path, force=force)
            _publish(building, path)
    except OSError as error:
        raise StorageError(
            f"--output {path}: cannot write {error.filename or path} ({error.strerror}); "
            "free some space or choose a writable folder"
        ) from error


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
    """Rename the finished folder durably; an earlier result is removed only after that."""
    earlier = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    if path.exists():
        path.rename(earlier)
    try:
        building.rename(path)
    except OSError:
        if earlier.exists():
            earlier.rename(path)
        raise
    sync_directory(path.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line in UTF-8; returns the number of lines."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            write_line(file, record)
            count += 1
    return count


class Writes(Protocol):
    """Takes text."""

    def write(self, text: str, /) -> object:
        """Append."""


def write_line(file: Writes, record: Mapping[str, Any]) -> None:
    """Write one record of a JSONL file."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in UTF-8."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


def write_description(
    folder: Path,
    *,
    kind: str,
    seed: int,
    records: Mapping[str, int],
    details: Mapping[str, Any],
    packages: Iterable[str],
) -> None:
    """Write `corpus.json`, which says what a folder holds and how it was made.

    Args:
        folder: the corpus.
        kind: name of the command.
        seed: seed of the command.
        records: number of records by file.
        details: further entries.
        packages: packages whose versions the output depends on.
    """
    versions = {name: metadata.version(name) for name in packages}
    made_with = {"python": platform.python_version(), **versions, "platform": sys.platform}
    description = {"format": 1, "kind": kind, "seed": seed, "records": records, **details, "made_with": made_with}
    write_json(folder / DESCRIPTION, description)
