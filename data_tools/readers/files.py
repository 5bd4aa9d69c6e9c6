"""Input files of every kind: what kind a file is, what splits it has, and which records they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from data_tools.readers.formats import FORMATS, Container, recognise, renamed
from data_tools.readers.json_file import divide_json, json_entries
from data_tools.readers.parquet_table import MAGIC, column_names, divide_parquet, parquet_entries
from data_tools.readers.record import Entry, RecordError, parse_json
from data_tools.readers.splits import Split
from data_tools.readers.tar_archive import divide_tar, is_tar, tar_entries
from megavl.config.errors import DataError, UsageError

_SAMPLED = 100
"""Records looked at to recognise a format."""
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_KINDS = {"json": "a JSON file", "tar": "a tar archive", "parquet": "a Parquet file"}


def container_of(path: str, *, start: bytes) -> Container:
    """The kind of a file that begins with these 512 bytes or more.

    Raises:
        DataError: the whole file is compressed, so it cannot be divided.
    """
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"{path}: is compressed ({name}) and cannot be read in parts; decompress it first")
    if start.startswith(MAGIC):
        return "parquet"
    return "tar" if is_tar(start) else "json"


def choose_format(path: str, *, container: Container, asked: str, columns: Mapping[str, str]) -> str:
    """The format of a file; `asked` is a row of FORMATS, or `auto`.

    Raises:
        UsageError: the format is not recognised, or this kind of file cannot hold the wanted one.
    """
    if asked == "auto":
        return _recognise(path, container=container, columns=columns)
    if container not in FORMATS[asked].containers:
        fitting = ", ".join(name for name, row in FORMATS.items() if container in row.containers)
        raise UsageError(f"--format {asked}: {path} is {_KINDS[container]}, which holds {fitting}; name one of these")
    return asked


def divide_file(path: str, *, container: Container, size: int, limit: int | None = None) -> list[Split]:
    """Divide a file of any kind into splits of about `size` bytes; `limit` records at most."""
    kinds = {"json": divide_json, "tar": divide_tar, "parquet": divide_parquet}
    return kinds[container](path, size=size, limit=limit)


def entries(split: Split) -> Iterator[Entry]:
    """The records of a split, in order."""
    readers = {"member": tar_entries, "row": parquet_entries, "line": json_entries, "item": json_entries}
    return readers[split.position_kind](split)


def _recognise(path: str, *, container: Container, columns: Mapping[str, str]) -> str:
    """The format of the first record that has one; each record is later read in its own."""
    if container == "tar":
        return "webdataset"
    found, seen = _first_format(path, container=container, columns=columns)
    if found is None:
        raise UsageError(
            f"--input {path}: format not recognised (it has {seen}); known formats are {', '.join(FORMATS)}, named by "
            "--format; keys and columns that are called otherwise are named by --columns"
        )
    return "parquet" if container == "parquet" and found != "obelics" else found


def check_columns(path: str, *, container: Container, columns: Mapping[str, str]) -> None:
    """Raise UsageError where none of the first records has a key or column that is named."""
    seen: set[str] = set()
    for content in _first_records(path, container=container):
        for part in (content, *(turn for value in content.values() if isinstance(value, list) for turn in value)):
            seen |= part.keys() if isinstance(part, Mapping) else set()
    for name, column in columns.items():
        if column not in seen:
            raise UsageError(
                f"--columns {name}={column}: no {column!r} in the first records of {path}; they have "
                f"{', '.join(sorted(map(str, seen))[:20])}"
            )


def _first_records(path: str, *, container: Container) -> Iterator[Mapping[str, Any]]:
    """The first records of a file that are objects."""
    for split in divide_file(path, container=container, size=1 << 30, limit=_SAMPLED):
        for entry in islice(entries(split), _SAMPLED):
            try:
                content = parse_json(entry.content) if isinstance(entry.content, bytes) else entry.content
            except RecordError:
                continue
            if isinstance(content, Mapping):
                yield content


def _first_format(path: str, *, container: Container, columns: Mapping[str, str]) -> tuple[str | None, str]:
    seen = f"columns {', '.join(column_names(path)[:20])}" if container == "parquet" else ""
    for split in divide_file(path, container=container, size=1 << 30, limit=_SAMPLED):
        for entry in islice(entries(split), _SAMPLED):
            if isinstance(entry.content, RecordError):
                continue
            try:
                content = parse_json(entry.content) if isinstance(entry.content, bytes) else entry.content
                name = recognise(renamed(content, columns))
            except RecordError:
                continue
            if name:
                return name, ""
            seen = seen or (f"keys {', '.join(list(content)[:8])}" if isinstance(content, dict) else "no objects")
    return None, seen or "no valid JSON"
