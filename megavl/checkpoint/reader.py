"""Reading a checkpoint in one process, without a model and without a process group: one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megavl.checkpoint.directory import check, recover
from megavl.checkpoint.manifest import MANIFEST
from megavl.checkpoint.names import PREFIX, flat_names, is_stacked
from megavl.checkpoint.safe_unpickle import check_backend, load_item, read_metadata
from megavl.config.errors import CheckpointError, UsageError
from megavl.config.load import model_config_from_dict
from megavl.config.model import ModelConfig

MODEL_FILE = "model.json"


def resolve(path: str | Path, *, skip_hash: bool = False) -> Path:
    """Find and verify the checkpoint that a user's MODEL argument means.

    Args:
        path: checkpoint directory, or a directory of checkpoints, of which the newest valid one is taken.
        skip_hash: check sizes only, not hashes.

    Returns:
        The checkpoint directory.

    Raises:
        CheckpointError: nothing there, or nothing valid; a checkpoint that is named itself never falls back.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a checkpoint or the directory that holds them")
    if (path / MANIFEST).exists() or path.name.startswith("iter_"):
        check(path, skip_hash=skip_hash)
        return path
    found = recover(path, skip_hash=skip_hash)
    if found.path is None:
        raise CheckpointError(found.explain(path))
    return found.path


def load_model_config(path: str | Path) -> ModelConfig:
    """Sizes of the model in a checkpoint directory, from its `model.json`."""
    source = Path(path) / MODEL_FILE
    try:
        raw = json.loads(source.read_text(encoding="utf-8"))
        return model_config_from_dict(raw, source=str(source))
    except (OSError, UsageError, ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: not readable ({' '.join(str(error).split())[:300]})") from error


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A block of a stored tensor and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    info: Any


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor of a checkpoint whose bytes are read when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    _path: Path = field(repr=False)
    _key: str
    _layer: int | None
    _chunks: tuple[_Chunk, ...] = field(repr=False)

    def load(self) -> torch.Tensor:
        """The whole tensor, on the CPU, in the stored type; reads its own bytes only."""
        return self._read(None)

    def load_slice(self, start: int, stop: int, *, axis: int = 0) -> torch.Tensor:
        """What lies between two indices of an axis; reads only the stored blocks that hold some of it."""
        if not 0 <= axis < len(self.shape) or not 0 <= start <= stop <= self.shape[axis]:
            raise IndexError(f"{self._key}: {start} to {stop} on axis {axis} of shape {self.shape}")
        return self._read((axis, start, stop))

    def _read(self, window: tuple[int, int, int] | None) -> torch.Tensor:
        low, high = [0] * len(self.shape), list(self.shape)
        if window is not None:
            axis, low[axis], high[axis] = window
        shape = [stop - start for start, stop in zip(low, high)]
        if len(self._chunks) == 1 and prod(self._chunks[0].sizes) == prod(shape):
            return self._load(self._chunks[0]).detach().reshape(shape).contiguous()
        out = torch.empty(shape, dtype=self.dtype)
        for chunk in self._chunks:
            self._copy(chunk, out, low, high)
        return out

    def _copy(self, chunk: _Chunk, out: torch.Tensor, low: list[int], high: list[int]) -> None:
        stacked = self._layer is not None
        offsets, sizes = (chunk.offsets[1:], chunk.sizes[1:]) if stacked else (chunk.offsets, chunk.sizes)
        first = [max(offset, start) for offset, start in zip(offsets, low)]
        last = [min(offset + size, stop) for offset, size, stop in zip(offsets, sizes, high)]
        if any(start >= stop for start, stop in zip(first, last)):
            return
        value = self._load(chunk)
        if self._layer is not None:
            value = value[self._layer - chunk.offsets[0]]
        there = tuple(slice(start - begin, stop - begin) for start, stop, begin in zip(first, last, low))
        here = tuple(slice(start - begin, stop - begin) for start, stop, begin in zip(first, last, offsets))
        out[there].copy_(value[here])

    def _load(self, chunk: _Chunk) -> torch.Tensor:
        file = self._path / chunk.info.relative_path
        source = f"{file}: {self._key}"
        try:
            with file.open("rb") as stream:
                value = load_item(stream, chunk.info, source=source)
        except OSError as error:
            raise CheckpointError(f"{source}: not readable ({error.strerror})") from error
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != chunk.sizes or value.dtype != self.dtype:
            raise CheckpointError(f"{source}: does not hold the {self.dtype} tensor of {chunk.sizes} that is listed")
        return value


class ModelTensors(Mapping[str, LazyTensor]):
    """Weights of a checkpoint by canonical flat name, in the order of the stored keys."""

    def __init__(self, tensors: dict[str, LazyTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_model_tensors(path: str | Path, *, skip_hash: bool = False) -> ModelTensors:
    """Open the weights of a checkpoint under their flat names (layers unstacked, norms renamed, no prefix).

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
            tensors.update(_lazy_tensors(path, key, entry, metadata.storage_data))
    if not tensors:
        raise CheckpointError(f"{path}: holds no weights; expected keys that start with {PREFIX!r}")
    return ModelTensors(tensors)


def _lazy_tensors(
    path: Path, key: str, entry: TensorStorageMetadata, stored: Mapping[Any, Any]
) -> dict[str, LazyTensor]:
    chunks = [
        _Chunk(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes), info=stored[MetadataIndex(key, chunk.offsets)])
        for chunk in entry.chunks
    ]
    shape, dtype = tuple(entry.size), entry.properties.dtype
    if not is_stacked(key):
        whole = LazyTensor(shape=shape, dtype=dtype, _path=path, _key=key, _layer=None, _chunks=tuple(chunks))
        return {key.removeprefix(PREFIX): whole}
    of_layer: list[list[_Chunk]] = [[] for _ in range(shape[0])]
    for chunk in chunks:
        for layer in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
            of_layer[layer].append(chunk)
    return {
        name: LazyTensor(
            shape=shape[1:], dtype=dtype, _path=path, _key=key, _layer=layer, _chunks=tuple(of_layer[layer])
        )
        for layer, name in enumerate(flat_names(key, layers=shape[0]))
    }
