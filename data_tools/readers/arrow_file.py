"""Arrow files, as the library `datasets` saves them: IPC streams, and IPC files. Needs pyarrow, an optional package.

A file is one split, because a stream has no index. Its record batches are validated before their values are looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.readers.parquet_table import BATCH_BYTES, BATCH_ROWS, first_line, pyarrow_missing, row_values
from data_tools.readers.record import Entry, RecordError
from data_tools.readers.splits import Split
from megavl.config.errors import DataError

_FILE = b"ARROW1\0\0"
_STREAM = b"\xff\xff\xff\xff"


def is_arrow(start: bytes) -> bool:
    """Whether a file that begins with these bytes is an Arrow file or stream."""
    return start.startswith((_FILE, _STREAM))


def holds_arrow(path: str | Path) -> bool:
    """Whether a file is an Arrow file or stream."""
    with open(path, "rb") as stream:
        return is_arrow(stream.read(len(_FILE)))


def arrow_schema(path: str | Path) -> Any:
    """The schema of a file.

    Raises:
        DataError: the file is damaged.
        UsageError: pyarrow is not installed.
    """
    try:
        with _source(path, mapped=True) as source:
            return _reader(source).schema
    except _pyarrow(path).lib.ArrowException as error:
        raise _damaged(path, error) from error


def divide_arrow(path: str | Path, *, limit: int | None = None) -> list[Split]:
    """The file as one split of `limit` rows at most.

    Raises:
        DataError: the file is damaged or ends too early.
    """
    rows = 0
    try:
        # Mapped, so that only what describes the batches is read.
        with _source(path, mapped=True) as source:
            for batch in _batches(source):
                rows += batch.num_rows
                if limit is not None and rows >= limit:
                    rows = limit
                    break
    except (_pyarrow(path).lib.ArrowException, OSError, MemoryError) as error:
        raise _damaged(path, error) from error
    whole = Split(
        path=str(path), position_kind="row", start=0, end=os.path.getsize(path), first_position=1, records=rows
    )
    return [whole] if rows else []


def arrow_entries(split: Split) -> Iterator[Entry]:
    """The rows of a split; those that cannot be read are RecordErrors."""
    return islice(_rows(split), split.records)


def _rows(split: Split) -> Iterator[Entry]:
    position = 1
    try:
        with _source(split.path, mapped=False) as source:
            for batch in _batches(source):
                size = batch.get_total_buffer_size() // max(1, batch.num_rows)
                together = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, size)))
                for first in range(0, batch.num_rows, together):
                    for row in _valid_rows(batch.slice(first, together)):
                        yield Entry(position, row, size)
                        position += 1
    except (_pyarrow(split.path).lib.ArrowException, OSError) as error:
        detail = f"the Arrow file cannot be read from here on ({first_line(error)})"
        for lost in range(position, split.records + 1):
            yield Entry(lost, RecordError(detail, "arrow_damaged"), 0)


def _valid_rows(batch: Any) -> Iterator[Any]:
    """The rows of a batch; offsets that lead out of their buffer would otherwise crash the process."""
    try:
        batch.validate(full=True)
    except Exception as error:  # on damaged bytes the library raises anything
        if batch.num_rows == 1:
            yield RecordError(f"cannot be read ({first_line(error)})", "arrow_damaged")
            return
        for number in range(batch.num_rows):
            yield from _valid_rows(batch.slice(number, 1))
    else:
        yield from row_values(batch)


def _batches(source: Any) -> Iterator[Any]:
    reader = _reader(source)
    if hasattr(reader, "get_batch"):
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from reader


def _reader(source: Any) -> Any:
    from pyarrow import ipc

    start = source.read(len(_FILE))
    source.seek(0)
    return ipc.open_file(source) if start == _FILE else ipc.open_stream(source)


def _source(path: str | Path, *, mapped: bool) -> Any:
    pyarrow = _pyarrow(path)
    return pyarrow.memory_map(str(path)) if mapped else pyarrow.OSFile(str(path))


def _pyarrow(path: str | Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise pyarrow_missing(path, kind="Arrow") from error
    return pyarrow


def _damaged(path: str | Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: not a readable Arrow file ({first_line(error)}); the file is damaged or cut off, get it again"
    )
