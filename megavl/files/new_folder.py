"""New folders that appear complete or not at all, made by one process at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megavl.config.errors import UsageError
from megavl.files.durable import sync_directory
from megavl.files.owner import Owner
from megavl.files.ownership import Ownership, is_owner_file, take


def require_free(path: Path) -> None:
    """Refuse a path that holds something.

    Raises:
        UsageError: it is a folder that is not empty, or something else.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{path}: exists and is not a folder; choose another output")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path}: exists and is not empty; choose another output or empty it")


@contextlib.contextmanager
def work_folder(path: Path, *, name: str) -> Iterator[tuple[Path, Ownership]]:
    """A folder beside `path` for one process that makes this file or folder, which owns `path` that way.

    It is called `.NAME.partial`, and is gone after the context. What a killed process left there is removed.

    Args:
        path: absolute.
        name: what the user calls it, for messages.

    Raises:
        UsageError: another process makes the same.
        StorageError: the folder cannot be written.
    """
    work = path.parent / f".{path.name}.partial"
    try:
        with take(work, Owner.this_process(), name=name) as held:
            _empty(work)
            try:
                yield work, held
            finally:
                _empty(work, ignore_errors=True)
    finally:
        # It stays if another process has taken it meanwhile.
        with contextlib.suppress(OSError):
            work.rmdir()


@contextlib.contextmanager
def new_folder(path: Path, *, name: str) -> Iterator[Path]:
    """An empty folder to fill, which gets the name `path` when the context ends without an error.

    Args:
        path: free, or an empty folder.
        name: what the user calls it, for messages.

    Raises:
        UsageError: another process makes this folder, or it holds something.
        OSError, StorageError: the storage failed; nothing is left.
    """
    path = Path(os.path.abspath(path))
    with work_folder(path, name=name) as (work, held):
        require_free(path)
        draft = work / "new"
        draft.mkdir()
        yield draft
        sync_directory(draft)
        held.confirm()
        require_free(path)
        os.rename(draft, path)
    sync_directory(path.parent)


def _empty(folder: Path, *, ignore_errors: bool = False) -> None:
    """Remove everything but the owner's name."""
    for entry in folder.iterdir():
        if is_owner_file(entry):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=ignore_errors)
        else:
            entry.unlink(missing_ok=True)
