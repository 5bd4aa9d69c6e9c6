"""Reads a checkpoint in one process, without a model and without a process group, one tensor at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megavl.checkpoint.directory import candidates
from megavl.checkpoint.find import MODEL_FILE as MODEL_FILE
from megavl.checkpoint.find import RECIPE_FILE, find
from megavl.checkpoint.find import load_model_config as load_model_config
from megavl.checkpoint.manifest import MANIFEST, read_manifest
from megavl.checkpoint.safe_unpickle import (
    BACKEND,
    COMMON,
    METADATA,
    check_backend,
    load_shard_item,
    read_metadata,
    require_readable,
)
from megavl.checkpoint.shard_reads import ShardReader
from megavl.checkpoint.stored_keys import PREFIX, canonical_names, is_stacked
from megavl.config.errors import CheckpointError, one_line
from megavl.files.model_folders import describe
from megavl.foreign.reading import open_regular
from megavl.weights.lazy import LazyTensor

_log = logging.getLogger(__name__)


def resolve(path: str | Path, *, skip_hash: bool = False) -> Path:
    """Find the checkpoint that a run would resume from or start from, at a path given by the user.

    Args:
        path: checkpoint directory, or a directory of checkpoints, of which the newest good one is taken.
        skip_hash: check sizes only, not hashes.

    Raises:
        CheckpointError: as `find`.
    """
    return find(path, skip_hash=skip_hash, require=require_usable)


def newest_checkpoints(directory: Path, *, count: int) -> list[Path]:
    """The newest checkpoints of a directory that a run would resume from, oldest first; each is verified.

    Raises:
        CheckpointError: there are fewer than `count`.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give one that holds checkpoints")
    found: list[Path] = []
    for candidate in candidates(directory):
        try:
            found.append(resolve(candidate))
        except CheckpointError as error:
            _log.warning("%s; left out", error)
        if len(found) == count:
            return found[::-1]
    other = None if found else describe(directory)
    raise CheckpointError(
        f"{directory}: holds {len(found)} good checkpoints, {count} are wanted{f': {other}' if other else ''}"
    )


def require_usable(path: Path) -> None:
    """Check everything that a load reads, but the numbers of tensors.

    Raises:
        CheckpointError: the first thing that a load of this checkpoint would refuse.
    """
    with ShardReader(path, check_beside_shards(path)) as shards:
        shards.check()


def check_beside_shards(path: Path) -> Metadata:
    """Check what a load reads besides shards, and that the manifest lists all of it.

    Returns:
        What `.metadata` says of the shards.

    Raises:
        CheckpointError: as `require_usable`.
    """
    metadata = require_readable(path)
    listed = read_manifest(path)["files"]
    for name in (METADATA, COMMON, BACKEND, MODEL_FILE, RECIPE_FILE):
        if os.path.lexists(path / name) and name not in listed:
            raise CheckpointError(f"{path / name}: refused, {MANIFEST} does not list it; remove it")
    tokenizer_folder(path)
    # A run's and a conversion's checkpoints have it.
    if MODEL_FILE in listed:
        load_model_config(path)
    return metadata


def tokenizer_folder(path: Path) -> Path:
    """The tokenizer's folder in a checkpoint directory.

    Raises:
        CheckpointError: it holds something that the manifest does not list, and that nobody has verified.
    """
    folder, listed = path / "tokenizer", read_manifest(path)["files"]
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if f"{folder.name}/{file.name}" not in listed:
            raise CheckpointError(f"{file}: refused, {MANIFEST} does not list it; remove it")
    return folder


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A block of a stored tensor, and the file and byte range that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    info: Any


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """The stored blocks of one tensor, or of one layer of a stacked tensor."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int | None
    chunks: tuple[_Chunk, ...]

    def load(self) -> torch.Tensor:
        """Read the whole tensor; no bytes of other tensors are read."""
        return self._read(None)

    def load_slice(self, start: int, stop: int, *, axis: int) -> torch.Tensor:
        """Read only the blocks that hold some of the slice."""
        return self._read((axis, start, stop))

    def _read(self, window: tuple[int, int, int] | None) -> torch.Tensor:
        low, high = [0] * len(self.shape), list(self.shape)
        if window is not None:
            axis, low[axis], high[axis] = window
        shape = [stop - start for start, stop in zip(low, high)]
        if len(self.chunks) == 1 and prod(self.chunks[0].sizes) == prod(shape):
            return self._load(self.chunks[0]).detach().reshape(shape).contiguous()
        out = torch.empty(shape, dtype=self.dtype)
        for chunk in self.chunks:
            self._copy(chunk, out, low, high)
        return out

    def _copy(self, chunk: _Chunk, out: torch.Tensor, low: list[int], high: list[int]) -> None:
        stacked = self.layer is not None
        offsets, sizes = (chunk.offsets[1:], chunk.sizes[1:]) if stacked else (chunk.offsets, chunk.sizes)
        first = [max(offset, start) for offset, start in zip(offsets, low)]
        last = [min(offset + size, stop) for offset, size, stop in zip(offsets, sizes, high)]
        if any(start >= stop for start, stop in zip(first, last)):
            return
        value = self._load(chunk)
        if self.layer is not None:
            value = value[self.layer - chunk.offsets[0]]
        there = tuple(slice(start - begin, stop - begin) for start, stop, begin in zip(first, last, low))
        here = tuple(slice(start - begin, stop - begin) for start, stop, begin in zip(first, last, offsets))
        out[there].copy_(value[here])

    def _load(self, chunk: _Chunk) -> torch.Tensor:
        file = self.path / chunk.info.relative_path
        source = f"{file}: {self.key}"
        try:
            with _open_shard(file) as stream:
                value = load_shard_item(stream, chunk.info, source=source)
        except OSError as error:
            raise CheckpointError(f"{source}: not readable ({error.strerror})") from error
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != chunk.sizes or value.dtype != self.dtype:
            raise CheckpointError(f"{source}: does not hold the {self.dtype} tensor of {chunk.sizes} that is listed")
        return value


def open_model_tensors(path: str | Path, *, skip_hash: bool = False) -> dict[str, LazyTensor]:
    """Open the weights of a checkpoint by canonical name, in the order of the stored keys.

    Args:
        path: checkpoint directory or its parent; verified as by `resolve`, at most once a process.
        skip_hash: check sizes only, not hashes.

    Raises:
        CheckpointError: damaged, hostile, or without weights.
    """
    path = resolve(path, skip_hash=skip_hash)
    check_backend(path)
    metadata = read_metadata(path)
    tensors: dict[str, LazyTensor] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata):
            for name, blocks in _blocks(path, key, entry, metadata.storage_data).items():
                tensors[name] = LazyTensor(
                    shape=blocks.shape, dtype=blocks.dtype, load=blocks.load, slicer=blocks.load_slice
                )
    if not tensors:
        raise CheckpointError(f"{path}: holds no weights; expected keys that start with {PREFIX!r}")
    return tensors


def _open_shard(file: Path) -> IO[bytes]:
    try:
        return open_regular(file, buffered=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable ({one_line(error)})") from error


def _blocks(path: Path, key: str, entry: TensorStorageMetadata, stored: Mapping[Any, Any]) -> dict[str, _Blocks]:
    """Blocks by canonical name."""
    chunks = [
        _Chunk(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes), info=stored[MetadataIndex(key, chunk.offsets)])
        for chunk in entry.chunks
    ]
    shape, dtype = tuple(entry.size), entry.properties.dtype
    if not is_stacked(key):
        (name,) = canonical_names(key, layers=0)
        return {name: _Blocks(path=path, key=key, shape=shape, dtype=dtype, layer=None, chunks=tuple(chunks))}
    of_layer: list[list[_Chunk]] = [[] for _ in range(shape[0])]
    for chunk in chunks:
        for layer in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
            of_layer[layer].append(chunk)
    return {
        name: _Blocks(path=path, key=key, shape=shape[1:], dtype=dtype, layer=layer, chunks=tuple(of_layer[layer]))
        for layer, name in enumerate(canonical_names(key, layers=shape[0]))
    }
