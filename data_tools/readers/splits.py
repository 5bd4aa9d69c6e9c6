"""JSON files as stretches of bytes that begin and end between two records.

A JSONL file is divided at line ends, a JSON array between its items; borders follow from the file and the wanted size
alone, so any number of workers and tasks makes the same stretches. Nothing is read whole into memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from data_tools.readers.record import MAX_RECORD
from megavl.config.errors import DataError, UsageError

Places = Literal["line", "item", "member", "row"]
"""What is counted in JSONL, in a JSON array, in a tar archive, in Parquet."""
_BLOCK = 8 << 20
_HASHED = 1 << 20
# A whole string, or one character of structure, or the quote of a string that this block does not finish.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},"]', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Some successive records of one file."""

    path: str
    places: Places
    start: int
    """First byte."""
    end: int
    first_place: int
    """Line, item, member or row of its first record, from 1."""
    records: int
    """Records inside; blank lines count too."""
    apart: tuple[int, ...] = ()
    """First members of the keys inside whose members are not adjacent in the whole archive."""

    def sha256(self) -> str:
        """Of its bytes."""
        digest = hashlib.sha256()
        # One buffer for all blocks: fresh memory for each would cost more than the reading.
        block = memoryview(bytearray(min(_HASHED, self.end - self.start)))
        with open(self.path, "rb", buffering=0) as stream:
            stream.seek(self.start)
            left = self.end - self.start
            while left and (count := stream.readinto(block[: min(_HASHED, left)])):
                digest.update(block[:count])
                left -= count
        return digest.hexdigest()


def places_of(path: str | Path) -> Literal["line", "item"]:
    """Whether a file is a JSON array or JSONL, by its first character.

    A JSONL file of bare turn lists also begins with a bracket; there the first line is JSON and another one follows.
    """
    with _opened(path) as stream:
        start = stream.read(_BLOCK).lstrip(b"\xef\xbb\xbf \t\r\n")
    first, _, rest = start.partition(b"\n")
    if not start.startswith(b"["):
        return "line"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "item"
    return "line" if rest.strip() else "item"


def divide(path: str | Path, *, size: int, limit: int | None = None) -> list[Stretch]:
    """Divide a file into stretches of about `size` bytes.

    Args:
        path: JSONL or a JSON array of records.
        size: bytes after which a stretch ends with the record at hand.
        limit: number of records after which the rest is left out.

    Raises:
        UsageError: the file cannot be read.
        DataError: the file is a JSON array that never ends.
    """
    places = places_of(path)
    with _opened(path) as stream:
        spans = _item_spans(stream, path=str(path)) if places == "item" else _line_spans(stream)
        stretches: list[Stretch] = []
        start, first, count, end = 0, 1, 0, 0
        for number, (begin, end) in enumerate(spans, start=1):
            start = begin if not count else start
            count += 1
            full = limit is not None and number >= limit
            if end - start >= size or full:
                stretches.append(_stretch(path, places, start=start, end=end, first=first, count=count))
                first, count = number + 1, 0
            if full:
                break
        if count:
            stretches.append(_stretch(path, places, start=start, end=end, first=first, count=count))
    return stretches


def records(stretch: Stretch) -> Iterator[tuple[int, bytes | None]]:
    """Place and bytes of each record; None instead of the bytes where they exceed MAX_RECORD."""
    with _opened(stretch.path) as stream:
        stream.seek(stretch.start)
        if stretch.places == "line":
            spans = _line_spans(stream, start=stretch.start, end=stretch.end)
        else:
            spans = _item_spans(stream, path=stretch.path, start=stretch.start, end=stretch.end)
        with _opened(stretch.path) as content:
            for place, (begin, end) in enumerate(spans, start=stretch.first_place):
                if end - begin > MAX_RECORD:
                    yield place, None
                    continue
                content.seek(begin)
                yield place, content.read(end - begin)


def _stretch(path: str | Path, places: Places, *, start: int, end: int, first: int, count: int) -> Stretch:
    return Stretch(path=str(path), places=places, start=start, end=end, first_place=first, records=count)


def _opened(path: str | Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"--input {path}: cannot read ({error.strerror}); give a JSONL or JSON file") from error


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
    """First byte and end of each item of a JSON array; the whole array, or the items between two such borders."""
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
