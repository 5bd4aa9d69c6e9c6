"""Files read by offset: nothing of them stays in memory, so opening a dataset costs the same at any size.

Files are not mapped. If a mapped file shrinks or its storage fails, SIGBUS kills the process; a failed read raises an
error that names the file.
"""

from __future__ import annotations

import io
import os
import resource
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError
from megavl.foreign.reading import regular_descriptor

_REMEDY = "run data_tools/preprocess.py again for this dataset"
_HEADER = 4096
"""Bytes within which the header of a table ends."""
BLOCK = 1 << 16
"""Rows read together by whoever goes through a whole file."""


class ReadHandles:
    """Open files by path, the least recently used closed first; usable after a fork, because reads carry an offset."""

    def __init__(self, *, limit: int | None = None) -> None:
        """Args: how many files may be open; default: half of what the process may have."""
        self._limit = limit or max(16, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) // 2)
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, *, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        Raises:
            DataError: the file is missing or shorter than that.
        """
        try:
            handle = self._open.pop(path) if path in self._open else regular_descriptor(path)
            self._open[path] = handle
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
            data = os.pread(handle, size, offset)
            while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"{path}: cannot read ({error.strerror}); restore the file or {_REMEDY}") from error
        if len(data) < size:
            raise DataError(f"{path}: ends before byte {offset + size}; restore the file or {_REMEDY}")
        return data

    def size(self, path: str) -> int:
        """Bytes of a file.

        Raises:
            DataError: it is missing.
        """
        try:
            return os.path.getsize(path)
        except OSError as error:
            raise DataError(f"{path}: cannot read ({error.strerror}); restore the file or {_REMEDY}") from error

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1])


class Rows:
    """Fixed-width rows at an offset of a file."""

    def __init__(self, path: str, *, dtype: np.dtype[Any], offset: int, count: int, handles: ReadHandles) -> None:
        """Args: file, type of a row, byte of the first row, number of rows, and where data is read through."""
        self.path = path
        self._dtype, self._offset, self._count, self._handles = dtype, offset, count, handles

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Any:
        """One row."""
        return self.rows(row, 1)[0]

    def rows(self, first: int, count: int) -> npt.NDArray[Any]:
        """Successive rows, fewer at the end of the file; an array of its own.

        Raises:
            DataError: the file is missing or shorter than when it was opened.
        """
        assert 0 <= first <= self._count, f"{self.path}: row {first} of {self._count}"
        count, size = min(count, self._count - first), self._dtype.itemsize
        raw = self._handles.read(self.path, offset=self._offset + first * size, size=count * size)
        # A copy is writable and aligned; the bytes may be neither.
        found: npt.NDArray[Any] = np.frombuffer(raw, self._dtype).copy()
        return found

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """All rows in blocks, each with the number of its first row."""
        for first in range(0, self._count, BLOCK):
            yield first, self.rows(first, BLOCK)


def open_table(path: str | Path, *, dtype: np.dtype[Any], handles: ReadHandles, rows: int | None = None) -> Rows:
    """A table that numpy has saved.

    Args:
        path: `.npy` file.
        dtype: expected type of a row.
        handles: where data is read through.
        rows: expected number; default: any.

    Raises:
        DataError: unreadable, or with other columns, another number of rows or another size.
    """
    path = str(path)
    size = handles.size(path)
    head = io.BytesIO(handles.read(path, offset=0, size=min(size, _HEADER)))
    try:
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("not version 1.0 of numpy's format")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape, fortran, found = np.lib.format.read_array_header_1_0(head)
    except Exception as error:  # numpy's header parser raises anything on damaged bytes
        raise DataError(f"{path}: cannot read the table ({error}); {_REMEDY}") from error
    count = shape[0] if len(shape) == 1 and not fortran else -1
    if found != dtype or count < 0 or rows not in (None, count):
        raise DataError(
            f"{path}: holds {shape} rows of {found}, expected {'any' if rows is None else rows} rows of {dtype}; "
            f"{_REMEDY}"
        )
    if size != head.tell() + count * dtype.itemsize:
        raise DataError(f"{path}: holds {size} bytes, which {count} rows do not make; restore the file or {_REMEDY}")
    return Rows(path, dtype=dtype, offset=head.tell(), count=count, handles=handles)
