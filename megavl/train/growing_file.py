"""Files of a run that grow by one record a step. A failing storage costs records, never the run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megavl.files.durable import set_aside
from megavl.foreign.printing import say


def warn(text: str) -> None:
    """Print a warning on standard error."""
    say(f"warning: {text}", to_errors=True)


def free_for_file(path: Path) -> None:
    """Free the name of a file: a folder, a pipe, a device or a dangling link there is renamed, with a warning.

    Raises:
        OSError: the directory cannot be written.
    """
    if os.path.lexists(path) and not path.is_file():
        warn(f"{path}: is no file; renamed to {set_aside(path).name}")


class GrowingFile:
    """Appends records; a record is in the file completely or not at all."""

    def __init__(self, path: Path, *, head: bytes = b"") -> None:
        """Do not touch the storage yet.

        Args:
            head: stands before the first record.
        """
        self.path = path
        self.lost = 0
        """Records that are not in the file."""
        self.trouble = ""
        """Why the last record was not written; empty if it was."""
        self._head = head

    def append(self, record: bytes) -> None:
        """Append a record. The first failure is a warning; so is the first success after it."""
        try:
            # Opened anew each time: a directory that was unmounted or renamed meanwhile is found again.
            _append(self.path, self._head + record)
        except OSError as error:
            self.lost += 1
            if not self.trouble:
                warn(f"{self.path} cannot be written ({error.strerror}); training goes on, and its records are lost")
            self.trouble = error.strerror or str(error)
            return
        self._head = b""
        if self.trouble:
            warn(f"{self.path} can be written again; records lost so far: {self.lost}")
            self.trouble = ""


def _append(path: Path, data: bytes) -> None:
    # A pipe without a reader is an error, not a reason to wait.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
