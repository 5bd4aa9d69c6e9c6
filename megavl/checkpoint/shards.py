"""What one rank writes of a checkpoint, and how the ranks' parts become one `.metadata`.

megatron-core's `torch_dist` writer starts a manager process and forks one writer per file. This takes 0.5 s to 3 s even
for a small save, and is not safe once CUDA runs. Its division of replicas gives whole tensors to ranks, so the largest
tensor bounds the balance. The files written here have the same format, so `dist_checkpointing.load` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, is_main_replica
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megavl.checkpoint.fault import inject_fault
from megavl.checkpoint.shard_files import ShardFiles
from megavl.checkpoint.shares import Part, ShardId, may_write, rows_of, shard_id
from megavl.files import activity
from megavl.files.file_series import FileSeries


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of a tensor, or an object, that this rank writes."""

    key: str
    data: Any
    """Tensor with all axes of the whole tensor, or the object."""
    shape: tuple[int, ...] | None
    """Of the whole tensor; None for an object."""
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Written:
    """A block that stands in a shard file."""

    key: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    info: _StorageInfo


def own_blocks(entries: Sequence[ShardedBase], parts: Mapping[ShardId, Sequence[Part]], *, rank: int) -> list[Block]:
    """What this rank writes: its part of each tensor that data-parallel ranks share, and its own objects.

    Args:
        entries: shards of this rank.
        parts: who writes which rows of each tensor.
    """
    blocks: list[Block] = []
    for entry in entries:
        if isinstance(entry, ShardedObject):
            if is_main_replica(entry.replica_id):
                blocks.append(Block(key=entry.unique_key, data=entry.data, shape=None))
        elif may_write(entry):
            blocks += [_rows(entry, part.start, part.stop) for part in parts[shard_id(entry)] if part.rank == rank]
    return blocks


def _rows(shard: ShardedTensor, start: int, stop: int) -> Block:
    view, offsets = rows_of(shard, start, stop)
    return Block(key=shard.key, data=view, shape=tuple(shard.global_shape), offsets=tuple(offsets))


def write_blocks(
    blocks: Sequence[Block], directory: Path, *, rank: int, step: int, note: Callable[[], None] = activity.note
) -> tuple[list[Written], dict[str, dict[str, Any]]]:
    """Write blocks into this rank's shard files. Not collective.

    Args:
        directory: existing, without shard files of this rank.
        note: called before each block.

    Returns:
        What was written, and size and sha256 of each file by name.

    Raises:
        OSError: the storage failed; also RuntimeError, from torch's writer.
    """
    written: list[Written] = []
    with FileSeries(directory, hashed=True) as series:
        files = ShardFiles(series, rank=rank)
        for number, block in enumerate(blocks):
            if number == 1:
                inject_fault("mid_shard", rank=rank, step=step)
            note()
            tensor = block.data.cpu() if block.shape is not None else None
            written.append(
                Written(
                    key=block.key,
                    shape=block.shape,
                    dtype=None if tensor is None else tensor.dtype,
                    offsets=block.offsets,
                    sizes=() if tensor is None else tuple(tensor.shape),
                    info=files.append([block.data] if tensor is None else tensor),
                )
            )
    return written, series.records


def metadata_of(parts: Sequence[Sequence[Written]]) -> Metadata:
    """The content of `.metadata` for what all ranks have written."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for item in (item for part in parts for item in part):
        if item.shape is None or item.dtype is None:
            entries[item.key] = BytesStorageMetadata()
            stored[MetadataIndex(item.key)] = item.info
            continue
        shape, offsets = torch.Size(item.shape), torch.Size(item.offsets)
        entry = entries.setdefault(item.key, TensorStorageMetadata(TensorProperties(dtype=item.dtype), shape, []))
        assert isinstance(entry, TensorStorageMetadata), f"{item.key} is an object and a tensor"
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(item.sizes)))
        stored[MetadataIndex(item.key, offsets)] = item.info
    return Metadata(state_dict_metadata=entries, storage_data=stored, storage_meta=StorageMeta())
