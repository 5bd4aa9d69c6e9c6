"""Writing a weights-only checkpoint from flat tensors in one process: one tensor in memory at a time, no process group.

The result is an ordinary sharded checkpoint of iteration 0, which a model of any layout loads strictly.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megavl.checkpoint import commit
from megavl.checkpoint.directory import checkpoint_name, point_latest
from megavl.checkpoint.durable import storage_errors, write_durably
from megavl.checkpoint.hashed import HashedFiles
from megavl.checkpoint.names import extra_state_keys, language_model_names, place_of
from megavl.checkpoint.reader import MODEL_FILE
from megavl.checkpoint.safe_unpickle import METADATA
from megavl.config.errors import CheckpointError
from megavl.config.load import to_dict
from megavl.config.model import ModelConfig

SHARD_BYTES = 2 << 30
"""A new shard file begins beyond this size, so that hashing and loading can work on several at once."""


def write_model_checkpoint(
    directory: str | Path,
    *,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    files: Mapping[str, bytes | Path],
) -> Path:
    """Write the weights of a model as checkpoint `iter_0000000`.

    Args:
        directory: directory of checkpoints; created if needed.
        config: sizes of the model, written to `model.json`.
        tensors: (flat name, tensor) pairs in any order; each tensor is released before the next is taken.
        files: content or source file by name inside the checkpoint, e.g. `tokenizer/tokenizer.json`.

    Returns:
        The committed checkpoint; its manifest's content is `{"weights_only": true}`.

    Raises:
        CheckpointError: a tensor of the language model is missing, given twice or does not fit its layers; or the
            directory holds a valid checkpoint of iteration 0.
        StorageError: the storage failed; nothing is left behind.
    """
    directory = Path(directory).absolute()
    layers = config.llm.num_layers
    doing = f"{directory}: writing weights"
    with storage_errors(doing):
        directory.mkdir(parents=True, exist_ok=True)
        commit.free_name(directory, 0, skip_hash=False)
        # What a killed conversion left is as large as a model.
        for leftover in directory.glob(f"{checkpoint_name(0)}.tmp-*"):
            shutil.rmtree(leftover)
        temporary = commit.make_temporary(directory, 0)
    try:
        with storage_errors(doing):
            with HashedFiles(temporary) as shard_files:
                shards = _ShardFiles(shard_files, layers=layers)
                for name, tensor in tensors:
                    shards.add(name, tensor)
                write_durably(temporary / METADATA, pickle.dumps(shards.finish()))
            commit.write_common({}, temporary)
            own = {MODEL_FILE: json.dumps(to_dict(config), indent=1).encode()}
            commit.add_files(temporary, {**files, **own})
            records = shard_files.records | commit.records_of(temporary, commit.other_files(temporary))
            commit.write_manifest(temporary, iteration=0, world_size=1, content={"weights_only": True}, records=records)
            final = commit.publish(temporary, directory, 0)
    except BaseException:
        commit.discard(temporary)
        raise
    point_latest(directory, final)
    return final


class _ShardFiles:
    """Appends tensors to shard files and keeps the book that becomes `.metadata`."""

    def __init__(self, files: HashedFiles, *, layers: int) -> None:
        self._files = files
        self._layers = layers
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._stored: dict[MetadataIndex, _StorageInfo] = {}
        self._missing = set(language_model_names(layers=layers))
        self._count = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        place = place_of(name)
        tensor = tensor.detach().cpu().contiguous()
        shape, offsets = tuple(tensor.shape), (0,) * tensor.dim()
        if place.layer is not None:
            if place.layer >= self._layers:
                raise CheckpointError(f"{name}: the configuration has {self._layers} layers")
            tensor, shape, offsets = tensor.unsqueeze(0), (self._layers, *shape), (place.layer, *offsets)
        entry = self._entries.setdefault(
            place.key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata), f"{place.key} is an object"
        if tuple(entry.size) != shape or entry.properties.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name}: {tensor.dtype} of {shape}, other layers have {entry.properties.dtype} of {tuple(entry.size)}"
            )
        index = MetadataIndex(place.key, offsets)
        if index in self._stored:
            raise CheckpointError(f"{name}: given twice")
        # A view would drag its whole storage into the file.
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        self._stored[index] = self._append(tensor)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.size()))
        self._missing.discard(name)

    def finish(self) -> Metadata:
        if self._missing:
            first = ", ".join(sorted(self._missing)[:5])
            raise CheckpointError(f"{len(self._missing)} tensors of the language model are missing: {first}")
        for key in extra_state_keys(layers=self._layers):
            self._entries[key] = BytesStorageMetadata()
            self._stored[MetadataIndex(key)] = self._append([None])
        return Metadata(state_dict_metadata=self._entries, storage_data=self._stored)

    def _append(self, value: Any) -> _StorageInfo:
        if not self._count or self._files.tell() > SHARD_BYTES:
            self._files.begin(f"__0_{self._count}.distcp")
            self._count += 1
        offset = self._files.tell()
        with _no_second_checksum():
            torch.save(value, cast(IO[bytes], self._files))
        return _StorageInfo(f"__0_{self._count - 1}.distcp", offset, self._files.tell() - offset)


@contextmanager
def _no_second_checksum() -> Iterator[None]:
    """torch's own CRC costs as much as a third of the sha256 that the manifest has anyway; torch never looks at it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
