"""Shard files of one rank: archives of `torch.save` one after the other, hashed while they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megavl.files.file_series import FileSeries

SHARD_BYTES = 2 << 30
"""A new shard file begins after this many bytes, so that several can be hashed and loaded at once."""


class ShardFiles:
    """Appends values to `__<rank>_<n>.distcp`."""

    def __init__(self, files: FileSeries, *, rank: int) -> None:
        self._files, self._rank, self._count = files, rank, 0

    def append(self, value: Any) -> _StorageInfo:
        """Append a tensor on the CPU, or a list of plain values, as `torch.save` writes it.

        Returns:
            File and byte range.
        """
        if not self._count or self._files.tell() > SHARD_BYTES:
            self._files.begin(f"__{self._rank}_{self._count}.distcp")
            self._count += 1
        offset = self._files.tell()
        with _no_second_checksum():
            torch.save(_alone(value) if isinstance(value, torch.Tensor) else value, cast(IO[bytes], self._files))
        return _StorageInfo(f"__{self._rank}_{self._count - 1}.distcp", offset, self._files.tell() - offset)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage of its own size: torch.save writes the whole storage of a view."""
    tensor = tensor.contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if not tensor.numel():
        return tensor.clone()
    # The same memory, not a copy.
    raw = tensor.view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape)


@contextmanager
def _no_second_checksum() -> Iterator[None]:
    """Save without torch's own CRC, which no reader checks; it would cost a third of the time of the sha256."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
