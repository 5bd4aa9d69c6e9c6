"""Megatron's IndexedDataset pair (`.bin` with the elements, `.idx` with the borders), version 1, in numpy alone.

The stock class opens what is written here. It is not used for reading: its arrays are views that crash the process once
the dataset object is gone, and it checks nothing (see README).
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {"uint8": 1, "int32": 4}
_REMEDY = "run data_tools/preprocess.py again for this dataset"


def index_bytes(lengths: npt.NDArray[np.int32], *, dtype: str) -> bytes:
    """Content of an `.idx` file in which every sequence is a document of its own.

    Args:
        lengths: (S,) elements per sequence.
        dtype: `uint8` or `int32`.
    """
    count = len(lengths)
    sizes = lengths.astype("<i4")
    ends = np.cumsum(sizes, dtype="<i8") * np.dtype(dtype).itemsize
    offsets = np.concatenate([np.zeros(1, "<i8"), ends[:-1]]) if count else np.zeros(0, "<i8")
    header = _HEADER.pack(MAGIC, 1, _CODES[dtype], count, count + 1)
    return header + sizes.tobytes() + offsets.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()


class ReadHandles:
    """Open files by path, the least recently used closed first; usable after a fork, because reads carry an offset."""

    def __init__(self, *, limit: int = 128) -> None:
        self._limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, *, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        Raises:
            DataError: the file is missing or shorter than that.
        """
        try:
            handle = self._open.pop(path) if path in self._open else os.open(path, os.O_RDONLY)
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

    def close(self) -> None:
        """Close every file."""
        while self._open:
            os.close(self._open.popitem()[1])


class SequenceFile:
    """Reader of one pair that checks every field of the index against the others and against the `.bin` size."""

    def __init__(self, prefix: str | Path, *, dtype: str, sequences: int, handles: ReadHandles) -> None:
        """Read and check the index.

        Args:
            prefix: path without `.bin` / `.idx`.
            dtype: expected element type, `uint8` or `int32`.
            sequences: expected number of sequences.
            handles: where data is read through.

        Raises:
            DataError: naming the file and the field that is wrong.
        """
        self.path = f"{prefix}.bin"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._handles = handles
        index = f"{prefix}.idx"
        try:
            raw = Path(index).read_bytes()
            size = os.path.getsize(self.path)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot read ({error.strerror}); restore it or {_REMEDY}") from error
        expected = (MAGIC, 1, _CODES[dtype], sequences, sequences + 1)
        if len(raw) != _HEADER.size + 12 * sequences + 8 * (sequences + 1) or _HEADER.unpack_from(raw) != expected:
            raise DataError(f"{index}: is no version 1 index of {sequences} {dtype} sequences; restore it or {_REMEDY}")
        self.lengths: npt.NDArray[np.int32] = np.frombuffer(raw, "<i4", sequences, _HEADER.size).copy()
        ends = np.cumsum(self.lengths, dtype=np.int64) * self._dtype.itemsize
        self._starts = np.concatenate([np.zeros(1, np.int64), ends])
        offsets = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
        documents = np.frombuffer(raw, "<i8", sequences + 1, _HEADER.size + 12 * sequences)
        if (
            (self.lengths < 0).any()
            or not np.array_equal(offsets, self._starts[:-1])
            or not np.array_equal(documents, np.arange(sequences + 1))
        ):
            raise DataError(f"{index}: offsets or document borders contradict the lengths; restore it or {_REMEDY}")
        if size != self._starts[-1]:
            raise DataError(
                f"{self.path}: holds {size} bytes where its index expects {self._starts[-1]}; "
                f"restore the file or {_REMEDY}"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def byte_range(self, index: int) -> tuple[int, int]:
        """Offset and size in bytes of one sequence in `.bin`."""
        return int(self._starts[index]), int(self._starts[index + 1] - self._starts[index])

    def read_bytes(self, index: int) -> bytes:
        """One sequence as bytes."""
        offset, size = self.byte_range(index)
        return self._handles.read(self.path, offset=offset, size=size)

    def read(self, index: int) -> npt.NDArray[np.int32]:
        """One sequence of int32 elements, an array of its own."""
        return np.frombuffer(self.read_bytes(index), self._dtype).astype(np.int32)
