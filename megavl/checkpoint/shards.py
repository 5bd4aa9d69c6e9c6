"""Shard files: each rank writes and reads its own through torch's distributed checkpoint, in its own process.

megatron-core's `torch_dist` writer starts a manager process and forks one writer per file. This takes 0.5 s to 3 s even
for a small synchronous save. The files written here are the same, so `dist_checkpointing.load` reads them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megavl.checkpoint import collective_errors
from megavl.checkpoint.fault import inject_fault
from megavl.checkpoint.safe_unpickle import load_shard_item
from megavl.config.errors import CheckpointError, MegaVLError, one_line
from megavl.files import activity
from megavl.files.durable import storage_errors


def write_shards(sharded: ShardedStateDict, directory: Path, *, step: int) -> None:
    """Write this rank's tensors and objects into `directory`, and `.metadata` on rank 0. Collective.

    Args:
        sharded: `ShardedTensor`s and `ShardedObject`s only, factories applied.
        directory: existing, empty.

    Raises:
        StorageError: on all ranks, when the storage failed on any.
    """
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    try:
        checkpoint.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=_Writer(directory),
            planner=_SavePlanner(step=step),
        )
    except CheckpointException as error:
        raise _first_failure(error) from None


def own_shards(directory: Path) -> list[Path]:
    """Shard files of this rank."""
    return sorted(directory.glob(f"__{collective_errors.rank()}_*.distcp"))


class SafeLoad(LoadShardedStrategy):
    """Loads shards through the safe unpickler; for `dist_checkpointing.load(sharded_strategy=...)`."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> StateDict:
        """Load as megatron-core's `TorchDistLoadShardedStrategy` does, with our reader and planner. Collective.

        Raises:
            CheckpointError: on all ranks, naming the file and the key that could not be read on any.
        """
        by_key, flat_mapping, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        tensors = [item for items in by_key.values() for item in items if isinstance(item, ShardedTensor)]
        targets = mcore_to_pyt_state_dict(by_key, True)
        try:
            checkpoint.load(
                targets,
                storage_reader=_Reader(Path(checkpoint_dir), self._metadata),
                planner=_LoadPlanner(shapes_validation_sharded_tensors=tensors, flatten_state_dict=False),
            )
        except CheckpointException as error:
            raise _first_failure(error) from None
        loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in targets.items()}
        nested = _replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, renamed)
        _restore_dict_types(nested, sharded_state_dict)
        return nested

    @property
    def can_handle_sharded_objects(self) -> bool:
        """True: objects are stored next to the tensors."""
        return True

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> Any:
        """Not offered: `megavl.checkpoint.state` compares keys before the load."""
        raise NotImplementedError

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        """Checked by `safe_unpickle.check_backend`."""

    def check_version_compatibility(self, loaded_version: Any) -> None:
        """Checked by `safe_unpickle.check_backend`."""


class SafeCommonLoad(TorchCommonLoadStrategy):
    """Returns a common state that the safe unpickler has read."""

    def __init__(self, common: StateDict) -> None:
        self._common = common

    def load_common(self, checkpoint_dir: str | Path) -> StateDict:
        """Return the common state."""
        return self._common


class _SavePlanner(MCoreSavePlanner):
    def __init__(self, *, step: int) -> None:
        super().__init__(flatten_state_dict=False)
        self._step = step
        self._resolved = 0

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if self._resolved == 1:
            inject_fault("mid_shard", rank=collective_errors.rank(), step=self._step)
        self._resolved += 1
        activity.note()
        data: torch.Tensor | io.BytesIO = super().resolve_data(write_item)
        return data


class _Writer(checkpoint.FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: Any) -> Future[list[WriteResult]]:
        # Translated here: an exception that is sent to other ranks loses its cause.
        with storage_errors(f"{self.path}: rank {collective_errors.rank()} writing its shard"):
            return super().write_data(plan, planner)

    def storage_meta(self) -> StorageMeta:
        # Without the parent's path and random id, so that equal states give equal bytes in any directory.
        return StorageMeta()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with storage_errors(f"{self.path}: writing .metadata"):
            super().finish(metadata, results)


class _Reader(checkpoint.FileSystemReader):
    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            path = Path(self.path) / name
            with path.open("rb") as stream:
                for item in sorted(items, key=lambda item: self.storage_data[item.storage_index].offset):
                    source = f"{path}: {item.storage_index.fqn}"
                    value = load_shard_item(stream, self.storage_data[item.storage_index], source=source)
                    _deliver(item, value, planner, source=source)
                    activity.note()
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _LoadPlanner(MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        # The parent would unpickle `value` without restriction; ours was unpickled by `load_shard_item`.
        self.original_state_dict[read_item.dest_index.fqn] = value


def _deliver(item: ReadItem, value: Any, planner: LoadPlanner, *, source: str) -> None:
    if item.type == LoadItemType.BYTE_IO:
        planner.load_bytes(item, value)
        return
    target = planner.resolve_tensor(item).detach()
    if not isinstance(value, torch.Tensor) or value.dim() != target.dim():
        raise CheckpointError(f"{source}: holds no tensor of {target.dim()} axes")
    part = narrow_tensor_by_index(value, item.storage_offsets, item.lengths)
    if part.size() != target.size():
        raise CheckpointError(f"{source}: shape {tuple(part.size())}, expected {tuple(target.size())}")
    target.copy_(part)
    planner.commit_tensor(item, target)


def _first_failure(error: CheckpointException) -> BaseException:
    """The error of the lowest failing rank, the same on all ranks."""
    number, (cause, _) = min(error.failures.items())
    if isinstance(cause, MegaVLError):
        return cause
    return CheckpointError(f"rank {number}: {type(cause).__name__}: {one_line(cause, limit=300)}")
