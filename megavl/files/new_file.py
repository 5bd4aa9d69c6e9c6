"""New files that appear complete or not at all: they get their name after they are written and synced."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from megavl.config.errors import StorageError
from megavl.files import durable

_SUFFIX = ".tmp"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file as a manifest in its directory lists it."""

    name: str
    size: int
    """Bytes."""
    sha256: str


class NewFile:
    """A file under construction: `commit` gives it its name; without it, the end of the context removes it."""

    def __init__(self, path: Path) -> None:
        """Open a temporary file beside `path`; its random name is unique even among several machines."""
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}{_SUFFIX}")
        self._digest = hashlib.sha256()
        self.size = 0
        """Bytes written so far."""
        with _writing(self._temporary):
            self._stream = self._temporary.open("w+b")

    def write(self, data: bytes | memoryview) -> None:
        """Append.

        Raises:
            StorageError: the storage is full or failing.
        """
        with _writing(self._temporary):
            self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    def read_back(self, start: int, size: int) -> bytes:
        """Read bytes that were written earlier.

        Raises:
            StorageError: the storage is full or failing.
        """
        with _writing(self._temporary):
            self._stream.flush()
            return os.pread(self._stream.fileno(), size, start)

    def commit(self) -> FileEntry:
        """Sync the file and give it its final name.

        Raises:
            StorageError: the storage is full or failing.
        """
        with _writing(self._temporary):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._temporary, self.path)
        return FileEntry(name=self.path.name, size=self.size, sha256=self._digest.hexdigest())

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        # A full disk also fails the last flush; the file goes anyway.
        with contextlib.suppress(OSError):
            self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def write_file(path: Path, data: bytes) -> FileEntry:
    """Write a file that appears complete or not at all."""
    with NewFile(path) as file:
        file.write(data)
        return file.commit()


def sync_directory(path: Path) -> None:
    """Sync the names in a directory.

    Raises:
        StorageError: the storage is failing.
    """
    with _writing(path):
        durable.sync_directory(path)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of killed runs."""
    for file in path.glob(f".*{_SUFFIX}"):
        file.unlink(missing_ok=True)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The error for a file that cannot be written."""
    return StorageError(f"{path}: cannot write ({error.strerror}); free or repair the storage and start again")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error
