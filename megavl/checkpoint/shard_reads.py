"""Reads the blocks of stored tensors that a rank needs, and no other bytes where the file allows it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megavl.checkpoint.safe_unpickle import check_shard_item, load_shard_item
from megavl.checkpoint.shares import row_axis
from megavl.config.errors import CheckpointError, one_line
from megavl.files import activity
from megavl.foreign.reading import open_regular

BLOCK_BYTES = 64 << 20
"""Rows are read in pieces of at most this many bytes, or one row."""
_MOST_OPEN = 64
"""Shard files that are open at once; a checkpoint may have thousands."""


class ShardReader:
    """Reads from the shard files of one checkpoint."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self._path, self._metadata = path, metadata
        self._open: dict[str, io.BufferedReader] = {}
        self.read_bytes = 0
        """Bytes of tensors read so far."""

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._open.values():
            stream.close()

    def load_object(self, key: str) -> Any:
        """The object with a stored key."""
        info = self._metadata.storage_data[MetadataIndex(key)]
        value = load_shard_item(self._stream(info), info, source=self._source(info, key))
        if not isinstance(value, list) or len(value) != 1:
            raise CheckpointError(f"{self._source(info, key)}: holds no object")
        return value[0]

    def check(self) -> None:
        """Check all items as a load does, without reading numbers.

        Raises:
            CheckpointError: the first, in the order of the files, that is not what `.metadata` says.
        """
        stored = self._metadata.storage_data
        items: list[tuple[Any, str, tuple[int, ...], torch.dtype | None]] = []
        for key, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                for chunk in entry.chunks:
                    info = stored[MetadataIndex(key, chunk.offsets)]
                    items.append((info, key, tuple(chunk.sizes), entry.properties.dtype))
            else:
                items.append((stored[MetadataIndex(key)], key, (), None))
        for info, key, sizes, dtype in sorted(items, key=lambda item: (item[0].relative_path, item[0].offset)):
            if dtype is None:
                self.load_object(key)
            elif self._start(info, key, sizes=sizes, dtype=dtype) is None:
                self._load_tensor(info, key, sizes=sizes, dtype=dtype)
            activity.note()

    def fill(self, target: torch.Tensor, *, key: str, offsets: Sequence[int]) -> None:
        """Fill a tensor with the block of a stored tensor at `offsets`.

        Args:
            target: all axes of the stored tensor; any dtype, any device.
        """
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), f"{key} is an object"
        for chunk in entry.chunks:
            low = [max(a, b) for a, b in zip(offsets, chunk.offsets)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, target.shape, chunk.offsets, chunk.sizes)]
            if any(start >= stop for start, stop in zip(low, high)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets))
            here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets))
            info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            self._copy(target[there], info, here, sizes=tuple(chunk.sizes), dtype=entry.properties.dtype, key=key)

    def _copy(
        self,
        target: torch.Tensor,
        info: Any,
        window: tuple[slice, ...],
        *,
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        key: str,
    ) -> None:
        """Copy a window of one stored item of these sizes."""
        start = self._start(info, key, sizes=sizes, dtype=dtype)
        if start is None:
            value = self._load_tensor(info, key, sizes=sizes, dtype=dtype)
            self.read_bytes += value.nbytes
            target.copy_(value[window])
            return
        stream, source = self._stream(info), self._source(info, key)
        # Rows are contiguous in the file; of each, the window may take a part.
        axis = row_axis(sizes)
        rest = sizes[axis + 1 :]
        row = prod(rest)
        step = max(1, BLOCK_BYTES // (row * dtype.itemsize))
        first, last = (window[axis].start, window[axis].stop) if sizes else (0, 1)
        for begin in range(first, last, step):
            count = min(step, last - begin)
            rows = torch.empty(count * row, dtype=dtype)
            self._read(stream, info.offset + start + begin * row * dtype.itemsize, rows, source=source)
            if not sizes:
                target.copy_(rows[0])
                return
            part = rows.view((1,) * axis + (count, *rest))[(slice(None),) * (axis + 1) + window[axis + 1 :]]
            target.narrow(axis, begin - first, count).copy_(part)

    def _start(self, info: Any, key: str, *, sizes: tuple[int, ...], dtype: torch.dtype) -> int | None:
        """Where the numbers of a stored tensor begin in its item; None if torch has to read it."""
        archive = check_shard_item(self._stream(info), info, source=self._source(info, key))
        return archive.plain_tensor(sizes=sizes, dtype=dtype)

    def _load_tensor(self, info: Any, key: str, *, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with strides or an offset, as other programs may store it."""
        source = self._source(info, key)
        value = load_shard_item(self._stream(info), info, source=source)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != sizes or value.dtype != dtype:
            raise CheckpointError(f"{source}: does not hold the {dtype} tensor of {sizes} that is listed")
        return value

    def _read(self, stream: io.BufferedReader, position: int, rows: torch.Tensor, *, source: str) -> None:
        raw = memoryview(rows.view(torch.uint8).numpy().data)
        try:
            stream.seek(position)
            found = stream.readinto(raw)
        except OSError as error:
            raise CheckpointError(f"{source}: not readable ({error.strerror})") from error
        if found != len(raw):
            raise CheckpointError(f"{source}: {found} of {len(raw)} bytes can be read")
        self.read_bytes += found
        activity.note()

    def _stream(self, info: Any) -> io.BufferedReader:
        name = info.relative_path
        if name not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            try:
                self._open[name] = cast(io.BufferedReader, open_regular(self._path / name, buffered=True))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self._path / name}: not readable ({one_line(error)})") from error
        return self._open[name]

    def _source(self, info: Any, key: str) -> str:
        return f"{self._path / info.relative_path}: {key}"
