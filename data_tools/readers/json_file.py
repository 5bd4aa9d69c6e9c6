"""JSON files: JSONL is divided at line ends, a JSON array between its items. No file is read whole into memory.

JSONL may be compressed with gzip or zstd. Such a file is one split, because it can only be read from its beginning.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import islice, starmap
from pathlib import Path
from typing import BinaryIO, Literal

from data_tools.readers.compressed import GZIP, ZSTD, Decompressed
from data_tools.readers.record import MAX_RECORD, Entry, RecordError
from data_tools.readers.splits import Split, group
from megavl.config.errors import DataError, UsageError
from megavl.foreign.reading import open_regular

_BLOCK = 8 << 20
# A whole string, or one character of structure, or the quote of a string that this block does not finish.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},"]', re.DOTALL)


def json_position_kind(path: str | Path) -> Literal["line", "item"]:
    """`item` for a JSON array, `line` for JSONL, by the first character.

    A JSONL file of bare lists also begins with a bracket. Its first line is JSON, and another line follows.
    """
    with open_json(path) as stream:
        start = stream.read(_BLOCK).lstrip(b"\xef\xbb\xbf \t\r\n")
    first, _, rest = start.partition(b"\n")
    if not start.startswith(b"["):
        return "line"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "item"
    return "line" if rest.strip() else "item"


def divide_json(path: str | Path, *, size: int, limit: int | None = None) -> list[Split]:
    """Divide JSONL or a JSON array into splits of about `size` bytes; `limit` records at most.

    Raises:
        UsageError: the file cannot be read.
        DataError: the file is a JSON array that never ends or that is compressed, or a damaged compressed file.
    """
    kind = json_position_kind(path)
    with open_json(path) as stream:
        if isinstance(stream, Decompressed):
            if kind == "item":
                raise DataError(f"{path}: is a compressed JSON array, of which only JSONL is read; decompress it first")
            chunks = iter([(0, os.path.getsize(path), 1, _count_lines(stream, limit=limit))])
            return [split for split in group(chunks, path=path, position_kind=kind, size=size) if split.records]
        spans = _item_spans(stream, path=str(path)) if kind == "item" else _line_spans(stream)
        chunks = ((begin, end, position, 1) for position, (begin, end) in enumerate(spans, start=1))
        return group(chunks, path=path, position_kind=kind, size=size, limit=limit)


def json_records(split: Split) -> Iterator[tuple[int, bytes | None]]:
    """Position and bytes of each record; None instead of the bytes where they exceed MAX_RECORD."""
    with open_json(split.path) as stream:
        if isinstance(stream, Decompressed):
            yield from enumerate(islice(stream.lines(longest=MAX_RECORD), split.records), start=split.first_position)
            return
        stream.seek(split.start)
        if split.position_kind == "line":
            spans = _line_spans(stream, start=split.start, end=split.end)
        else:
            spans = _item_spans(stream, path=split.path, start=split.start, end=split.end)
        with open_regular(split.path, buffered=True) as content:
            for position, (begin, end) in enumerate(spans, start=split.first_position):
                if end - begin > MAX_RECORD:
                    yield position, None
                    continue
                content.seek(begin)
                yield position, content.read(end - begin)


def json_entries(split: Split) -> Iterator[Entry]:
    """The records of a split; those that exceed MAX_RECORD are RecordErrors."""
    # No loop, whose variable would keep a long record in memory while it is worked on.
    return starmap(_entry, json_records(split))


def _entry(position: int, raw: bytes | None) -> Entry:
    if raw is None:
        return Entry(position, RecordError(f"longer than {MAX_RECORD} bytes", "record_too_long"), 0)
    return Entry(position, raw, len(raw))


def open_json(path: str | Path) -> BinaryIO | Decompressed:
    """Open a JSON file, compressed or not.

    Raises:
        UsageError: the file cannot be read, or its compression needs a package that is not installed.
    """
    try:
        stream = open_regular(path, buffered=True)
        start = stream.read(len(ZSTD[0]))
        stream.seek(0)
    except OSError as error:
        raise UsageError(f"--input {path}: cannot read ({error.strerror}); give a JSONL or JSON file") from error
    return Decompressed(stream, path=str(path), start=start) if start.startswith((GZIP, *ZSTD)) else stream


def _count_lines(stream: Decompressed, *, limit: int | None) -> int:
    count, last = 0, b"\n"
    while block := stream.read(_BLOCK):
        count, last = count + block.count(b"\n"), block[-1:]
        if limit is not None and count >= limit:
            return limit
    return count + (last != b"\n")


def _line_spans(stream: BinaryIO, *, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """First byte and end (line feed included) of each line."""
    begin = position = start
    while end is None or position < end:
        block = stream.read(_BLOCK if end is None else min(_BLOCK, end - position))
        if not block:
            break
        found = block.find(b"\n")
        while found >= 0:
            yield begin, position + found + 1
            begin = position + found + 1
            found = block.find(b"\n", found + 1)
        position += len(block)
    if position > begin:
        yield begin, position


def _item_spans(
    stream: BinaryIO, *, path: str, start: int | None = None, end: int | None = None
) -> Iterator[tuple[int, int]]:
    """First byte and end of each item of a JSON array, or of those between the two borders of a split."""
    depth = 0 if start is None else 1
    base = begin = start or 0
    buffer = b""
    while True:
        block = stream.read(_BLOCK if end is None else max(0, min(_BLOCK, end - base - len(buffer))))
        buffer += block
        position = 0
        for match in _TOKEN.finditer(buffer):
            token = match[0]
            if token == b'"':
                position = match.start()
                break
            position = match.end()
            if token in b"[{":
                depth += 1
                if depth == 1:
                    begin = base + position
            elif token in b"]}":
                depth -= 1
                if depth == 0:
                    if begin < base or buffer[begin - base : match.start()].strip():
                        yield begin, base + match.start()
                    if (buffer[position:] + stream.read(_BLOCK)).strip():
                        raise DataError(f"{path}: more text after the JSON array that begins it; split the file")
                    return
            elif token == b"," and depth == 1:
                yield begin, base + match.start()
                begin = base + position
        else:
            position = len(buffer)
        base += position
        buffer = buffer[position:]
        if not block:
            break
        if len(buffer) > MAX_RECORD:
            raise DataError(f"{path}: a string of more than {MAX_RECORD} bytes at byte {base}; correct the file")
    if end is None:
        raise DataError(f"{path}: the JSON array that begins this file never ends; the file is cut off, get it again")
    if begin < end:
        yield begin, end
