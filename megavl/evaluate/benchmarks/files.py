"""Rows of TSV, JSON, JSON Lines and Parquet files. Images stay on disk until they are needed."""

from __future__ import annotations

import csv
import glob
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from megavl.config.errors import DataError, UsageError, one_line
from megavl.data.image import ImageError
from megavl.evaluate.benchmarks.row import Row, decode_base64
from megavl.foreign.parsing import LARGE_JSON_FILE, parse_json
from megavl.foreign.reading import open_regular, read_limited
from megavl.generate.prompt import StoredImage

MAX_TSV_CELL = 128 << 20
"""Most characters of a cell of a TSV file; the largest images have 20 MB."""
REFERENCE = 64
"""Most characters of an image's cell in a TSV file that are the index of the row with the image."""
SUFFIXES = (".tsv", ".json", ".jsonl", ".parquet")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, in order.

    Raises:
        DataError: it cannot be read, or is damaged.
        UsageError: a Parquet file, and pyarrow is not installed.
    """
    readers = {".tsv": _tsv, ".json": _json, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file; give one as published")
    return readers[path.suffix](path)


def benchmark_files(where: str, *, names: tuple[str, ...], several: bool = False) -> list[Path]:
    """The files that a file, folder or quoted pattern stands for, in the order of their names.

    Args:
        where: as the user says it.
        names: patterns of the files of a folder; the first that any file has is taken.
        several: whether the benchmark consists of several files; the shards of one split are one file.

    Raises:
        DataError: there is none, or a folder holds several where one is wanted.
    """
    path = Path(where)
    if not path.is_dir():
        found = [path] if path.exists() else sorted(map(Path, glob.glob(where, recursive=True)))
        if not found:
            raise DataError(f"{where}: does not exist; give the benchmark's file, its folder or a quoted pattern")
        return found
    by_name = (sorted(one for one in path.rglob(name) if one.is_file()) for name in names)
    found = next((some for some in by_name if some), [])
    if not found:
        raise DataError(f"{where}: has no file {' or '.join(names)} in it; give the benchmark's file or folder")
    sharded = found[0].suffix == ".parquet"
    parts = {re.sub(r"-\d{5}-of-\d{5}", "", one.name) if sharded else str(one) for one in found}
    if not several:
        parts = {f"{one.parent}/{part}" for one in found for part in parts} if sharded else parts
    if len(parts) > 1 and (sharded or not several):
        shown = ", ".join(sorted(str(one.relative_to(path)) for one in found)[:6])
        raise DataError(f"{where}: holds several files or splits ({shown}); name one, or a quoted pattern of one split")
    return found


@dataclass(frozen=True, kw_only=True)
class TsvImage:
    """An image as base64 in a cell of a TSV file."""

    path: Path
    offset: int
    """Byte of the row's start in the file."""
    size: int
    """Bytes of the row."""
    column: int
    location: str

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: broken base64, or the file has changed.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                text = file.read(self.size).decode("utf-8")
            (cells,) = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
            return decode_base64(cells[self.column])
        except (OSError, ValueError, IndexError, csv.Error) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"{self.path} cannot be read any more ({one_line(error)})", "image_missing") from error

    def __str__(self) -> str:
        return self.location


@dataclass(frozen=True, kw_only=True)
class ParquetImage:
    """An image in a cell of a Parquet file."""

    path: Path
    group: int
    """Number of the row group."""
    index: int
    """Row of the group."""
    column: str
    location: str

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: the cell holds none.
        """
        cell = _image_column(self.path, self.group, self.column)[self.index].as_py()
        if isinstance(cell, list) and len(cell) == 1:
            (cell,) = cell
        data = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if isinstance(data, str):
            return decode_base64(data)
        if not isinstance(data, bytes):
            raise ImageError("the cell holds no bytes of an image", "image_empty")
        return data

    def __str__(self) -> str:
        return self.location


@dataclass(frozen=True, kw_only=True)
class TextImage:
    """An image as base64 in a JSON file, kept as it is."""

    text: str
    location: str

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            ImageError: broken base64.
        """
        return decode_base64(self.text)

    def __str__(self) -> str:
        return self.location


@dataclass(frozen=True, kw_only=True)
class _TsvRow:
    """Where a row of a TSV file is."""

    header: tuple[str, ...]
    offset: int
    """Byte of its start in the file."""
    size: int
    """Bytes."""
    location: str


def _tsv(path: Path) -> Iterator[Row]:
    # The file may be another one than when it was read before.
    _images_by_index.cache_clear()
    for row, values in _tsv_rows(path):

        def stored(name: str, *, row: _TsvRow = row, values: Mapping[str, str] = values) -> StoredImage:
            return _tsv_image(name, path=path, row=row, cell=values[name].strip())

        yield Row(location=row.location, folder=path.parent, values=values, stored=stored)


def _tsv_rows(path: Path) -> Iterator[tuple[_TsvRow, dict[str, str]]]:
    header: tuple[str, ...] = ()
    for number, offset, size, cells in _tsv_cells(path):
        if not header:
            header = tuple(name.strip() for name in cells)
            if doubled := next((name for name in header if header.count(name) > 1), None):
                raise DataError(f"{path}:1: two columns are called {doubled!r}")
            continue
        location = f"{path}:{number}"
        if len(cells) != len(header):
            raise DataError(
                f"{location}: has {len(cells)} cells for {len(header)} columns; a cell with a tab or a line break must "
                "be quoted"
            )
        values = dict(zip(header, cells))
        if index := values.get("index", "").strip():
            location += f" (index {index[:20]})"
        yield _TsvRow(header=header, offset=offset, size=size, location=location), values


def _tsv_image(name: str, *, path: Path, row: _TsvRow, cell: str) -> StoredImage:
    """The image in a cell of a row, or in the row whose index the cell names.

    Raises:
        DataError: there is no such row, or it has no image of its own.
    """
    if len(cell) <= REFERENCE:
        images = _images_by_index(path, name)
        if cell not in images:
            raise DataError(
                f"{row.location}: {name}: is that of row {cell!r}, which the file does not have or which has no image"
            )
        row = images[cell]
    location = f"{row.location}: {name}"
    return TsvImage(path=path, offset=row.offset, size=row.size, column=row.header.index(name), location=location)


@lru_cache(maxsize=2)
def _images_by_index(path: Path, column: str) -> dict[str, _TsvRow]:
    """The rows of a file that have an image of their own, by index."""
    rows = ((row, values) for row, values in _tsv_rows(path) if len(values.get(column, "").strip()) > REFERENCE)
    return {values.get("index", "").strip(): row for row, values in rows}


def _parquet_image(name: str, *, path: Path, group: int, index: int, location: str) -> StoredImage:
    return ParquetImage(path=path, group=group, index=index, column=name, location=f"{location}: {name}")


def _tsv_cells(path: Path) -> Iterator[tuple[int, int, int, list[str]]]:
    """Line, byte offset, bytes and cells of each row that is not blank."""
    csv.field_size_limit(MAX_TSV_CELL)
    read = 0
    lines = 0

    def decoded(file: Any) -> Iterator[str]:
        nonlocal read, lines
        for line in file:
            read += len(line)
            lines += 1
            yield line.decode("utf-8-sig" if lines == 1 else "utf-8")

    try:
        with io.BufferedReader(open_regular(path), 1 << 20) as file:  # type: ignore[type-var]
            reader = csv.reader(decoded(file), delimiter="\t", strict=True)
            offset, number = 0, 1
            for cells in reader:
                if cells:
                    yield number, offset, read - offset, cells
                offset, number = read, lines + 1
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}:{lines}: cannot be read as TSV ({one_line(error)}); get the file again") from error


def _json(path: Path) -> Iterator[Row]:
    """Objects of a JSON file: of a list, of `questions`, or by id. POPE calls JSON Lines `.json`."""
    data = _content(path)
    try:
        content = parse_json(data, limit=LARGE_JSON_FILE)
    except ValueError as error:
        if b"\n" in data.strip() and data.lstrip().startswith(b"{"):
            yield from _json_lines(path)
            return
        raise DataError(f"{path}: is no JSON that is read ({one_line(error)}); get the file again") from None
    objects: Iterator[tuple[str, Any]]
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        named = content.get("question_type")
        types = {str(number): name for name, number in named.items()} if isinstance(named, dict) else {}
        objects = (
            (f"row {number}", _with_type(one, types)) for number, one in enumerate(content["questions"], start=1)
        )
    elif isinstance(content, dict) and content and all(isinstance(one, dict) for one in content.values()):
        objects = ((f"row {key[:40]!r}", {"id": key, **one}) for key, one in content.items())
    elif isinstance(content, dict):
        objects = iter([("row 1", content)])
    elif isinstance(content, list):
        objects = ((f"row {number}", one) for number, one in enumerate(content, start=1))
    else:
        raise DataError(f"{path}: holds no objects; give the benchmark's file as published")
    for position, one in objects:
        yield _object_row(one, path=path, location=f"{path}: {position}")


def _with_type(one: Any, types: Mapping[str, str]) -> Any:
    """SEED-Bench numbers its question types and names them once for all."""
    if isinstance(one, dict) and str(one.get("question_type_id")) in types:
        return {**one, "category": types[str(one["question_type_id"])]}
    return one


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_content(path).split(b"\n"), start=1):
        if line.strip():
            location = f"{path}:{number}"
            try:
                value = parse_json(line)
            except ValueError as error:
                raise DataError(f"{location}: is no JSON object ({one_line(error)})") from None
            yield _object_row(value, path=path, location=location)


def _content(path: Path) -> bytes:
    try:
        return read_limited(path, limit=LARGE_JSON_FILE.size).removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _object_row(value: Any, *, path: Path, location: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{location}: is no JSON object")

    def stored(name: str) -> StoredImage:
        return TextImage(text=str(value[name]), location=f"{location}: {name}")

    return Row(location=location, folder=path.parent, values=value, stored=stored)


def _parquet(path: Path) -> Iterator[Row]:
    for cached in (_open_parquet, _image_column):
        cached.cache_clear()
    table = _open_parquet(path)
    first = 0
    for group in range(table.metadata.num_row_groups):
        index = 0
        for values in _parquet_values(table, group, path=path):
            location = f"{path}: row {first + index + 1}"

            stored = partial(_parquet_image, path=path, group=group, index=index, location=location)
            yield Row(location=location, folder=path.parent, values=values, stored=stored)
            index += 1
        first += index


def _parquet_values(table: Any, group: int, *, path: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in table.iter_batches(batch_size=16, row_groups=[group]):
            yield from batch.to_pylist()
    except Exception as error:  # on damaged bytes the library raises anything
        raise DataError(f"{path}: row group {group} is damaged ({one_line(error)}); get the file again") from error


@lru_cache(maxsize=8)
def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: reading Parquet needs pyarrow, which is not installed; install it with: "
            "pip install 'megavl[parquet]'"
        ) from error
    try:
        with open_regular(path):
            pass
        return parquet.ParquetFile(str(path), page_checksum_verification=True)
    except Exception as error:  # on damaged bytes the library raises anything
        raise DataError(f"{path}: is no readable Parquet file ({one_line(error)}); get the file again") from error


@lru_cache(maxsize=8)
def _image_column(path: Path, group: int, column: str) -> Any:
    """Cells of a column of a row group. Questions go through a file in order, so few groups are in memory."""
    try:
        return _open_parquet(path).read_row_group(group, columns=[column]).column(0)
    except DataError:
        raise
    except Exception as error:  # on damaged bytes the library raises anything
        raise ImageError(f"{path}: row group {group} is damaged ({one_line(error)})", "image_missing") from error
