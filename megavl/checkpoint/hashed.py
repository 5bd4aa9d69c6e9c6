"""New files that are hashed while they are written, so that none is read back, and synced while the next is written."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

_IN_PARALLEL = 1 << 20
"""Bytes of one write from which on another core hashes them meanwhile."""


class HashedFiles:
    """Writes files one after the other; on leaving the context all of them are on the storage.

    The hash covers what was given to `write`: unlike one that is read back, it also finds what the storage changed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._syncs: list[Future[None]] = []
        self._stream: Any = None
        self.records: dict[str, dict[str, Any]] = {}
        """Size in bytes and sha256 of every finished file, as in the manifest."""

    def __enter__(self) -> HashedFiles:
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
        """Finish the file at hand and begin another."""
        self.finish()
        self._stream = (self._directory / name).open("wb")
        self._name, self._digest, self._size = name, hashlib.sha256(), 0

    def finish(self) -> None:
        """Finish the file at hand; the storage gets it in the background."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        self.records[self._name] = {"size": self._size, "sha256": self._digest.hexdigest()}
        self._syncs.append(self._pool.submit(_settle, stream))

    def write(self, data: Any) -> int:
        """Append to the file at hand; with `flush` and `tell` all that `torch.save` asks of a stream."""
        size = memoryview(data).nbytes
        if size < _IN_PARALLEL:
            self._digest.update(data)
            self._stream.write(data)
        else:
            hashing = self._pool.submit(self._digest.update, data)
            try:
                self._stream.write(data)
            finally:
                # `data` belongs to the caller again after this call.
                hashing.result()
        self._size += size
        return size

    def flush(self) -> None:
        """Nothing: closing the file writes what is buffered."""

    def tell(self) -> int:
        """Bytes written to the file at hand."""
        return self._size


def _settle(stream: Any) -> None:
    with stream:
        stream.flush()
        os.fsync(stream.fileno())
