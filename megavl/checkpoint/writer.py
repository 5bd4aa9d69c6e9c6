"""Writes a weights-only checkpoint in one process without a process group, one tensor at a time.

The result is an ordinary sharded checkpoint of iteration 0. A model of any layout loads it strictly.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

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
from megavl.checkpoint.directory import checkpoint_name, update_latest
from megavl.checkpoint.reader import MODEL_FILE
from megavl.checkpoint.safe_unpickle import METADATA
from megavl.checkpoint.shard_files import ShardFiles
from megavl.checkpoint.stored_keys import extra_state_keys, stored_key
from megavl.config.errors import CheckpointError
from megavl.config.load import to_dict
from megavl.config.model import ModelConfig
from megavl.files.durable import storage_errors, write_durably
from megavl.files.file_series import FileSeries
from megavl.files.owner import Owner
from megavl.files.ownership import Ownership, take
from megavl.weights.canonical_names import canonical_shapes


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
        tensors: (canonical name, tensor) pairs in any order; each tensor is released before the next is taken.
        files: content or source file by name inside the checkpoint, e.g. `tokenizer/tokenizer.json`.

    Returns:
        The committed checkpoint; its manifest's content is `{"weights_only": true}`.

    Raises:
        CheckpointError: a tensor of the language model is missing, given twice or does not fit its layers. Or the
            directory holds a valid checkpoint of iteration 0.
        StorageError: the storage failed; nothing is left of the checkpoint.
        UsageError: another process owns the directory.
    """
    directory = Path(directory).absolute()
    with take(directory, Owner.this_process(), name="directory of checkpoints") as held:
        return _write_owned(directory, held, config=config, tensors=tensors, files=files)


def _write_owned(
    directory: Path,
    held: Ownership,
    *,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    files: Mapping[str, bytes | Path],
) -> Path:
    doing = f"{directory}: writing weights"
    with storage_errors(doing):
        commit.free_name(directory, 0, skip_hash=False)
        # Leftovers of a killed conversion are as large as a model.
        for leftover in directory.glob(f"{checkpoint_name(0)}.tmp-*"):
            shutil.rmtree(leftover)
        temporary = commit.make_temporary(directory, 0)
    try:
        with storage_errors(doing):
            with FileSeries(temporary, hashed=True) as shard_files:
                shards = _Weights(shard_files, config=config)
                for name, tensor in tensors:
                    shards.add(name, tensor)
                write_durably(temporary / METADATA, pickle.dumps(shards.finish()))
            commit.write_common(commit.encode_common({}), temporary)
            own = {MODEL_FILE: json.dumps(to_dict(config), indent=1).encode()}
            commit.write_extra_files(temporary, {**files, **own})
            records = shard_files.records | commit.file_records(temporary, commit.non_shard_files(temporary))
            commit.write_manifest(temporary, iteration=0, world_size=1, content={"weights_only": True}, records=records)
            held.confirm()
            final = commit.publish(temporary, directory, 0)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    update_latest(directory, final)
    return final


class _Weights:
    """Appends tensors to shard files and collects the content of `.metadata`."""

    def __init__(self, files: FileSeries, *, config: ModelConfig) -> None:
        self._files = ShardFiles(files, rank=0)
        self._layers = config.llm.num_layers
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._stored: dict[MetadataIndex, _StorageInfo] = {}
        self._missing = {name for name in canonical_shapes(config) if name.startswith("language_model.")}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        stored = stored_key(name)
        tensor = tensor.detach().cpu().contiguous()
        shape, offsets = tuple(tensor.shape), (0,) * tensor.dim()
        if stored.layer is not None:
            if stored.layer >= self._layers:
                raise CheckpointError(f"{name}: the configuration has {self._layers} layers")
            tensor, shape, offsets = tensor.unsqueeze(0), (self._layers, *shape), (stored.layer, *offsets)
        entry = self._entries.setdefault(
            stored.key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata), f"{stored.key} is an object"
        if tuple(entry.size) != shape or entry.properties.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name}: {tensor.dtype} of {shape}, other layers have {entry.properties.dtype} of {tuple(entry.size)}"
            )
        index = MetadataIndex(stored.key, offsets)
        if index in self._stored:
            raise CheckpointError(f"{name}: given twice")
        self._stored[index] = self._files.append(tensor)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.size()))
        self._missing.discard(name)

    def finish(self) -> Metadata:
        if self._missing:
            first = ", ".join(sorted(self._missing)[:5])
            raise CheckpointError(f"{len(self._missing)} tensors of the language model are missing: {first}")
        for key in extra_state_keys(layers=self._layers):
            self._entries[key] = BytesStorageMetadata()
            self._stored[MetadataIndex(key)] = self._files.append([None])
        return Metadata(state_dict_metadata=self._entries, storage_data=self._stored)
