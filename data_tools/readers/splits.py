"""Splits: byte ranges of input files that begin and end between two records.

Their borders follow from the file and the wanted size alone, so any number of workers makes the same splits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megavl.foreign.reading import regular_descriptor

PositionKind = Literal["line", "item", "member", "row"]
"""What positions count in JSONL, in a JSON array, in a tar archive, in Parquet."""
_HASHED = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Split:
    """Some successive records of one file."""

    path: str
    position_kind: PositionKind
    start: int
    """First byte."""
    end: int
    first_position: int
    """Line, item, member or row of its first record, from 1."""
    records: int
    """Records inside; blank lines count too."""
    scattered: tuple[int, ...] = ()
    """First members of the keys inside that have further members elsewhere in the archive."""

    def sha256(self) -> str:
        """Hash of its bytes."""
        digest = hashlib.sha256()
        # One buffer for all blocks: fresh memory for each would cost more than the reading.
        block = memoryview(bytearray(min(_HASHED, self.end - self.start)))
        with os.fdopen(regular_descriptor(self.path), "rb", buffering=0) as stream:
            stream.seek(self.start)
            left = self.end - self.start
            while left and (count := stream.readinto(block[: min(_HASHED, left)])):
                digest.update(block[:count])
                left -= count
        return digest.hexdigest()


def group(
    chunks: Iterable[tuple[int, int, int, int]],
    *,
    path: str | Path,
    position_kind: PositionKind,
    size: int,
    limit: int | None = None,
) -> list[Split]:
    """Join neighbouring chunks of a file into splits.

    Args:
        chunks: first byte, end, first position and number of records of what is never divided, in order.
        size: bytes after which a split ends.
        limit: number of records after which the rest is left out.
    """
    splits: list[Split] = []
    start = end = first = count = seen = 0
    for begin, end, position, records in chunks:
        if limit is not None:
            records = min(records, limit - seen)
        # Row groups of a Parquet file need not lie in their order; a split covers what lies between.
        start, first = (min(start, begin), first) if count else (begin, position)
        count, seen = count + records, seen + records
        if count and (end - start >= size or seen == limit):
            splits.append(_split_of(path, position_kind, start, end, first, count))
            count = 0
        if seen == limit:
            break
    if count:
        splits.append(_split_of(path, position_kind, start, end, first, count))
    return splits


def _split_of(path: str | Path, kind: PositionKind, start: int, end: int, first: int, count: int) -> Split:
    return Split(path=str(path), position_kind=kind, start=start, end=end, first_position=first, records=count)
