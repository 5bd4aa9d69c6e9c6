"""Megatron's IndexedDataset pair (`.bin` with the elements, `.idx` with the borders), version 1, in numpy alone.

Megatron's own class opens what is written here. It is not used for reading because it checks nothing, and because its
arrays are views that crash the process once the dataset object is gone.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megavl.config.errors import DataError
from megavl.data.table import ReadHandles, Rows

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


class SequenceFile:
    """Reader of one pair; nothing of either file stays in memory."""

    def __init__(self, prefix: str | Path, *, dtype: str, sequences: int, handles: ReadHandles) -> None:
        """Check header and size of the index.

        Args:
            prefix: path without `.bin` / `.idx`.
            dtype: expected element type, `uint8` or `int32`.
            sequences: expected number of sequences.
            handles: where data is read through.

        Raises:
            DataError: naming the file.
        """
        self.path, self.index_path = f"{prefix}.bin", f"{prefix}.idx"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._handles, self._count = handles, sequences
        self._size = handles.size(self.path)
        expected = _HEADER.pack(MAGIC, 1, _CODES[dtype], sequences, sequences + 1)
        size = _HEADER.size + 12 * sequences + 8 * (sequences + 1)
        if (
            handles.size(self.index_path) != size
            or handles.read(self.index_path, offset=0, size=_HEADER.size) != expected
        ):
            raise DataError(
                f"{self.index_path}: is no version 1 index of {sequences} {dtype} sequences; restore it or {_REMEDY}"
            )
        self._lengths = self._rows("<i4", _HEADER.size, sequences)
        self._offsets = self._rows("<i8", _HEADER.size + 4 * sequences, sequences)

    def _rows(self, dtype: str, offset: int, count: int) -> Rows:
        return Rows(self.index_path, dtype=np.dtype(dtype), offset=offset, count=count, handles=self._handles)

    def __len__(self) -> int:
        return self._count

    def lengths_of(self, first: int, count: int) -> npt.NDArray[np.int32]:
        """Elements of successive sequences."""
        return self._lengths.rows(first, count)

    def byte_range(self, index: int) -> tuple[int, int]:
        """Offset and size in bytes of one sequence in `.bin`.

        Raises:
            DataError: it lies outside the file.
        """
        offset, size = int(self._offsets[index]), int(self._lengths[index]) * self._dtype.itemsize
        if not 0 <= offset <= offset + size <= self._size:
            raise DataError(f"{self.index_path}: sequence {index} lies outside {self.path}; restore it or {_REMEDY}")
        return offset, size

    def read_bytes(self, index: int) -> bytes:
        """One sequence as bytes."""
        offset, size = self.byte_range(index)
        return self._handles.read(self.path, offset=offset, size=size)

    def read(self, index: int) -> npt.NDArray[np.int32]:
        """One sequence of int32 elements, an array of its own."""
        return np.frombuffer(self.read_bytes(index), self._dtype).astype(np.int32)
