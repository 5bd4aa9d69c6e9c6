"""Files that are on the disk before anybody relies on them; every failure of the storage is a `StorageError`."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megavl.config.errors import StorageError

# torch's zip writer hides the cause (disk full, file-size limit) behind these texts of a RuntimeError.
_WRITER_TEXTS = ("unexpected pos", "inline_container", "PytorchStreamWriter")


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn what the file system reports inside the block into a `StorageError` that says what was being done."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        place = f" ({error.filename})" if error.filename else ""
        raise StorageError(f"{doing}: {cause}{place}; free space or repair the storage, then run again") from error
    except RuntimeError as error:
        text = str(error)
        if not any(known in text for known in _WRITER_TEXTS):
            raise
        cause = f": {error.__context__}" if isinstance(error.__context__, OSError) else ""
        raise StorageError(
            f"{doing}: incomplete write{cause}; free space or raise the quota, then run again"
        ) from error


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until the storage has it."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def copy_durably(source: Path, target: Path) -> None:
    """Copy a file byte for byte and wait until the storage has it."""
    with source.open("rb") as reader, target.open("wb") as stream:
        shutil.copyfileobj(reader, stream, 1 << 20)
        stream.flush()
        os.fsync(stream.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Give a file new content such that readers see the old one or the new one, never a part."""
    aside = path.with_name(f"{path.name}.new")
    write_durably(aside, data)
    os.replace(aside, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the storage has the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
