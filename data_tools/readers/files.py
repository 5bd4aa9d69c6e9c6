"""Input files of every kind: what kind a file is, what splits it has, and which records they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from data_tools.readers.arrow_file import arrow_entries, arrow_schema, divide_arrow, holds_arrow, is_arrow
from data_tools.readers.compressed import GZIP, ZSTD
from data_tools.readers.conversations import ROLE_KEYS, as_list
from data_tools.readers.formats import FORMATS, Container, read_record, recognise, renamed
from data_tools.readers.json_file import divide_json, json_entries, open_json
from data_tools.readers.parquet_table import MAGIC, check_names, divide_parquet, open_parquet, parquet_entries
from data_tools.readers.record import Entry, Picture, RecordError, parse_json
from data_tools.readers.splits import Split
from data_tools.readers.tar_archive import divide_tar, is_tar, tar_entries
from megavl.config.errors import DataError, UsageError
from megavl.foreign.reading import open_regular

_SAMPLED = 100
"""Records looked at to recognise a format."""
_START = 512
_COMPRESSED = {
    GZIP: "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    **dict.fromkeys(ZSTD, "zstd"),
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
}
_KINDS = {"json": "a JSON file", "tar": "a tar archive", "parquet": "a Parquet file"}


class NoRecordsError(UsageError):
    """An input file that is sound, but empty; some writers of shards leave such ones."""


def container_of(path: str, *, start: bytes) -> Container:
    """The kind of a file that begins with these 512 bytes or more; a table is `parquet`, also as an Arrow file.

    Raises:
        DataError: the whole file is compressed, and is no JSONL in gzip or zstd; or it is damaged.
        UsageError: it is compressed with zstd, and no library for it is installed.
    """
    for magic, name in _COMPRESSED.items():
        if not start.startswith(magic):
            continue
        if magic in (GZIP, *ZSTD):
            with open_json(path) as stream:
                inner = stream.read(_START)
            if not (inner.startswith((MAGIC, *_COMPRESSED)) or is_arrow(inner) or is_tar(inner)):
                return "json"
        raise DataError(f"{path}: is compressed ({name}), which is read for JSONL in gzip or zstd; decompress it first")
    if start.startswith(MAGIC) or is_arrow(start):
        return "parquet"
    return "tar" if is_tar(start) else "json"


def schema_of(path: str) -> Any:
    """The Arrow schema of a table."""
    schema = arrow_schema(path) if holds_arrow(path) else open_parquet(path).schema_arrow
    check_names(schema, path=path)
    return schema


def choose_format(path: str, *, container: Container, asked: str, columns: Mapping[str, str]) -> str:
    """The format of a file; `asked` is a row of FORMATS, or `auto`.

    Raises:
        UsageError: the format is not recognised, or this kind of file cannot hold the wanted one.
        NoRecordsError: there is nothing to recognise.
    """
    if asked == "auto":
        return _recognise(path, container=container, columns=columns)
    if container not in FORMATS[asked].containers:
        fitting = ", ".join(name for name, row in FORMATS.items() if container in row.containers)
        kind = "an Arrow file" if container == "parquet" and holds_arrow(path) else _KINDS[container]
        raise UsageError(f"--format {asked}: {path} is {kind}, which holds {fitting}; name one of these")
    return asked


def divide_file(path: str, *, container: Container, size: int, limit: int | None = None) -> list[Split]:
    """Divide a file of any kind into splits of about `size` bytes; `limit` records at most."""
    if container == "parquet" and holds_arrow(path):
        return divide_arrow(path, limit=limit)
    kinds = {"json": divide_json, "tar": divide_tar, "parquet": divide_parquet}
    return kinds[container](path, size=size, limit=limit)


def entries(split: Split) -> Iterator[Entry]:
    """The records of a split, in order."""
    if split.position_kind == "row":
        return arrow_entries(split) if holds_arrow(split.path) else parquet_entries(split)
    return tar_entries(split) if split.position_kind == "member" else json_entries(split)


def first_with_image(
    path: str,
    *,
    container: Container,
    format: str | None,
    columns: Mapping[str, str],
    ignore: Collection[str],
    wanted: Callable[[Picture], bool] = lambda picture: True,
) -> int | None:
    """Position of a record with an image that is wanted among the first records of a file."""
    for position, content in _first_records(path, container=container):
        with contextlib.suppress(RecordError):
            if any(map(wanted, read_record(content, format=format, columns=columns, ignore=ignore).pictures)):
                return position
    return None


def _recognise(path: str, *, container: Container, columns: Mapping[str, str]) -> str:
    """The format of the first record that has one; each record is later read in its own."""
    if container == "tar":
        return "webdataset"
    found, seen = _first_format(path, container=container, columns=columns)
    if found is None and not seen:
        raise NoRecordsError(f"--input {path}: format not recognised (it has no records); leave it out")
    if found is None:
        raise UsageError(
            f"--input {path}: format not recognised (it has {seen}); known formats are {', '.join(FORMATS)}, named by "
            "--format; keys and columns that are called otherwise are named by --columns"
        )
    return "parquet" if container == "parquet" and found != "obelics" else found


def check_columns(paths: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raise UsageError where no file has a key, column or role that is named, among its first records.

    Args:
        paths: input files. What lies in a tar archive is not looked at.
        columns: names that the formats use, with those that the records have instead.
    """
    if not columns:
        return
    seen: set[str] = set()
    for path in paths:
        start = b""
        # A file that cannot be read is refused when it is opened as an input.
        with contextlib.suppress(OSError), open_regular(path) as stream:
            start = stream.read(_START)
        if (container := container_of(path, start=start)) == "tar":
            return
        for _, content in _first_records(path, container=container) if start else ():
            seen |= _names_in(content, role=columns.get("role", ""))
        if seen.issuperset(columns.values()):
            return
    for name, column in columns.items():
        if column not in seen:
            raise UsageError(
                f"--columns {name}={column}: no {column!r} in the first records of {', '.join(paths[:3])}; they have "
                f"{', '.join(sorted(map(str, seen))[:20])}"
            )


def _names_in(content: Any, *, role: str) -> set[str]:
    """Keys of a record and its turns, and the values under `role` or the usual keys of a role."""
    values = content.values() if isinstance(content, Mapping) else [content]
    found: set[str] = set()
    with contextlib.suppress(RecordError):
        for part in (content, *(turn for value in values for turn in as_list(value) or ())):
            if isinstance(part, Mapping):
                found |= part.keys() | {said for key in (*ROLE_KEYS, role) if isinstance(said := part.get(key), str)}
    return found


def _first_records(path: str, *, container: Container) -> Iterator[tuple[int, Any]]:
    """Position and content of the first records of a file that can be parsed."""
    for position, found in _first_parsed(path, container=container):
        if not isinstance(found, RecordError):
            yield position, found


def _first_parsed(path: str, *, container: Container) -> Iterator[tuple[int, Any]]:
    """Position of the first records of a file with their content, or the RecordError why there is none."""
    for split in divide_file(path, container=container, size=1 << 30, limit=_SAMPLED):
        for entry in islice(entries(split), _SAMPLED):
            content = entry.content
            if isinstance(content, bytes) and not content.strip():
                continue
            try:
                yield entry.position, parse_json(content) if isinstance(content, bytes) else content
            except RecordError as error:
                yield entry.position, error


def _first_format(path: str, *, container: Container, columns: Mapping[str, str]) -> tuple[str | None, str]:
    seen = damage = ""
    for position, content in _first_parsed(path, container=container):
        if container == "parquet" and not seen:
            seen = f"columns {', '.join(schema_of(path).names[:20])}"
        if isinstance(content, RecordError):
            damage = damage or f"no records: line or item {position} is {content}; each must be one record"
            continue
        with contextlib.suppress(RecordError, RecursionError):
            if name := recognise(renamed(content, columns)):
                return name, ""
        seen = seen or (f"keys {', '.join(list(content)[:8])}" if isinstance(content, dict) else "no objects")
    return None, seen or damage
