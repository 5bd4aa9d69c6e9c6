"""Parquet files: divided between row groups, read in batches of bounded size. Needs pyarrow, an optional package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from data_tools.readers.record import Entry, RecordError
from data_tools.readers.splits import Split, group
from megavl.config.errors import DataError, UsageError

MAGIC = b"PAR1"
BATCH_BYTES = 1 << 20
BATCH_ROWS = 256
"""Most bytes and rows that become Python values at a time; one more row may exceed the bytes."""


def divide_parquet(path: str | Path, *, size: int, limit: int | None = None) -> list[Split]:
    """Divide a table into splits of about `size` bytes, between two row groups; `limit` rows at most.

    Raises:
        DataError: the file is damaged.
        UsageError: pyarrow is not installed.
    """
    metadata = open_parquet(path).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    firsts = accumulate((rows.num_rows for rows in groups), initial=1)
    chunks = ((*_span(rows, path=path), first, rows.num_rows) for first, rows in zip(firsts, groups) if rows.num_rows)
    return group(chunks, path=path, position_kind="row", size=size, limit=limit)


def parquet_entries(split: Split) -> Iterator[Entry]:
    """The rows of a split; those that cannot be read are RecordErrors."""
    return islice(_rows(split), split.records)


def open_parquet(path: str | Path) -> Any:
    """Open a table and read its footer.

    Raises:
        DataError: no Parquet file, or a damaged one.
        UsageError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise pyarrow_missing(path, kind="Parquet") from error
    try:
        return parquet.ParquetFile(str(path), buffer_size=1 << 20, page_checksum_verification=True)
    except Exception as error:  # on damaged bytes the library raises anything
        raise DataError(
            f"{path}: not a readable Parquet file ({first_line(error)}); the file is damaged or cut off, get it again"
        ) from error


def pyarrow_missing(path: str | Path, *, kind: str) -> UsageError:
    """Says how to install the package that reads a file of this kind."""
    return UsageError(
        f"--input {path}: reading {kind} needs pyarrow, which is not installed; "
        "install it with: pip install 'megavl[parquet]' (or pip install pyarrow)"
    )


def row_values(batch: Any) -> Iterator[Mapping[str, Any] | RecordError]:
    """The rows of a record batch; those that cannot be read are RecordErrors.

    Times and dates become text: they carry nothing that is read, and Python's own types cannot hold all of them.
    """
    for number, field in enumerate(batch.schema):
        if (kind := _without_times(field.type)) != field.type:
            batch = batch.set_column(number, field.name, batch.column(number).cast(kind))
    try:
        yield from batch.to_pylist()
        return
    except Exception as error:  # one value spoils the batch: find out which
        spoilt = error
    for number in range(batch.num_rows):
        try:
            (row,) = batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            yield RecordError(f"not UTF-8 ({error.reason} at byte {error.start})", "encoding")
        except Exception as error:  # as above
            yield RecordError(f"cannot be read ({first_line(error) or first_line(spoilt)})")
        else:
            yield row


def _without_times(kind: Any) -> Any:
    """An Arrow type with text in place of times and dates, at any depth of its structs and lists."""
    import pyarrow
    from pyarrow import types

    if types.is_temporal(kind):
        return pyarrow.string()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_times(field.type)) for field in kind])
    lists = ((types.is_list, pyarrow.list_), (types.is_large_list, pyarrow.large_list))
    for is_kind, made in lists:
        if is_kind(kind):
            return made(kind.value_field.with_type(_without_times(kind.value_type)))
    return kind


def check_names(schema: Any, *, path: str | Path) -> None:
    """Raise DataError where two columns have one name: one of them would be lost."""
    names: list[str] = schema.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: two columns are called {twice[0]!r}; rename one of them")


def first_line(error: Exception) -> str:
    """The first line of another library's error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _rows(split: Split) -> Iterator[Entry]:
    table = open_parquet(split.path)
    metadata = table.metadata
    first = 1
    for number in range(metadata.num_row_groups):
        if first >= split.first_position:
            yield from _group_rows(table, number, first=first)
        first += metadata.row_group(number).num_rows


def _group_rows(table: Any, number: int, *, first: int) -> Iterator[Entry]:
    rows = table.metadata.row_group(number)
    position, end = first, first + rows.num_rows
    try:
        batches = table.iter_batches(batch_size=_batch_rows(rows), row_groups=[number], use_threads=False)
        for batch in batches:
            size = batch.nbytes // max(1, batch.num_rows)
            for row in row_values(batch):
                yield Entry(position, row, size)
                position += 1
    except MemoryError:
        raise
    except Exception as error:  # on damaged bytes the library raises anything
        detail = f"row group {number + 1} cannot be read from here on ({first_line(error)})"
        for lost in range(position, end):
            yield Entry(lost, RecordError(detail, "parquet_damaged"), 0)


def _batch_rows(rows: Any) -> int:
    size = sum(rows.column(number).total_uncompressed_size for number in range(rows.num_columns))
    return max(1, min(BATCH_ROWS, BATCH_BYTES * max(1, rows.num_rows) // max(1, size)))


def _span(rows: Any, *, path: str | Path) -> tuple[int, int]:
    """First byte and end of a row group."""
    total = os.path.getsize(path)
    begin, end = total, 0
    for number in range(rows.num_columns):
        chunk = rows.column(number)
        starts = [chunk.data_page_offset]
        if chunk.has_dictionary_page and chunk.dictionary_page_offset:
            starts.append(chunk.dictionary_page_offset)
        begin = min(begin, *starts)
        end = max(end, min(starts) + chunk.total_compressed_size)
    if not 0 <= begin <= end <= total:
        raise DataError(f"{path}: a row group lies outside the file; the file is damaged, get it again")
    return begin, end
