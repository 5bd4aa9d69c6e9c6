"""Large files written one after the other: each is synced while the next is written, and hashed on the way."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

_IN_PARALLEL = 1 << 20
"""A write of at least this many bytes is hashed on another core meanwhile."""


class FileSeries:
    """Writes files one after the other; all of them are on the storage when the context ends.

    The hash covers what was given to `write`. So it also reveals what the storage changed, and no file is read back.
    """

    def __init__(self, directory: Path, *, hashed: bool) -> None:
        self._directory = directory
        self._hashed = hashed
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._syncs: list[Future[None]] = []
        self._stream: Any = None
        self.records: dict[str, dict[str, Any]] = {}
        """Size in bytes and sha256 of every finished file by name, as in the manifest of a checkpoint."""

    def __enter__(self) -> FileSeries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
            for sync in self._syncs:
                sync.result()
        except OSError:
            # The first error is the one to report.
            if error is None:
                raise
        finally:
            self._pool.shutdown()

    def begin(self, name: str) -> None:
        """Finish the current file and begin another."""
        self.finish()
        self._stream = (self._directory / name).open("wb")
        self._name, self._digest, self._size = name, hashlib.sha256(), 0

    def finish(self) -> None:
        """Finish the current file; a thread syncs it."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        if self._hashed:
            self.records[self._name] = {"size": self._size, "sha256": self._digest.hexdigest()}
        self._syncs.append(self._pool.submit(_sync_and_close, stream))

    def write(self, data: Any) -> int:
        """Append to the current file. `torch.save` needs this method, `flush` and `tell` of a stream."""
        size = memoryview(data).nbytes
        hashing = None
        if self._hashed and size >= _IN_PARALLEL:
            hashing = self._pool.submit(self._digest.update, data)
        elif self._hashed:
            self._digest.update(data)
        try:
            self._stream.write(data)
        finally:
            # `data` belongs to the caller again after this call.
            if hashing is not None:
                hashing.result()
        self._size += size
        return size

    def flush(self) -> None:
        """Do nothing: closing the file writes what is buffered."""

    def tell(self) -> int:
        """Bytes written to the current file."""
        return self._size


def _sync_and_close(stream: Any) -> None:
    with stream:
        stream.flush()
        os.fsync(stream.fileno())
