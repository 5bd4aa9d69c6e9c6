"""Writes that are on the storage when they return; every failure of the storage is a `StorageError`."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megavl.config.errors import StorageError
from megavl.files import activity

# torch's zip writer hides the cause (disk full, file-size limit) in these texts of a RuntimeError.
_WRITER_TEXTS = ("unexpected pos", "inline_container", "PytorchStreamWriter")

_SYNCED_TOGETHER = 16


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an error of the file system into a `StorageError` that begins with `doing`."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        file = f" ({error.filename})" if error.filename else ""
        raise StorageError(f"{doing}: {cause}{file}; free space or repair the storage, then run again") from error
    except RuntimeError as error:
        text = str(error)
        if not any(known in text for known in _WRITER_TEXTS):
            raise
        cause = f": {error.__context__}" if isinstance(error.__context__, OSError) else ""
        raise StorageError(
            f"{doing}: incomplete write{cause}; free space or raise the quota, then run again"
        ) from error


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and sync it."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    activity.note()


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file byte for byte and sync the copy."""
    with source.open("rb") as reader, target.open("wb") as stream:
        shutil.copyfileobj(reader, stream, 1 << 20)
        stream.flush()
        os.fsync(stream.fileno())
    activity.note()


def replace_durably(path: Path, data: bytes) -> None:
    """Give a file new content in one step: readers see the old content or the new, never a mixture."""
    draft = path.with_name(f".{path.name}.new")
    try:
        write_durably(draft, data)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_directory(path.parent)


def set_aside(path: Path) -> Path:
    """Rename what stands in the way of a file or directory, to free its name; nothing is deleted."""
    aside = path.with_name(f"{path.name}.bad-{uuid.uuid4().hex[:12]}")
    path.rename(aside)
    sync_directory(path.parent)
    return aside


def sync_directory(path: Path) -> None:
    """Sync the names in a directory: without it, a power loss can undo a rename."""
    _sync(path, flags=os.O_DIRECTORY)


def sync_tree(path: Path) -> None:
    """Sync all files and folders below a folder, and the folder itself.

    Storage syncs many small files together, so this takes about a tenth of the time of one after the other.
    """
    files = [file for file in path.rglob("*") if not file.is_symlink()]
    with ThreadPoolExecutor(_SYNCED_TOGETHER) as threads:
        for _ in threads.map(_sync, [*files, path]):
            activity.note()


def _sync(path: Path, *, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
