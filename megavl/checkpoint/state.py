"""Checks a state on all ranks before a save or a load, so that a mismatch changes neither files nor tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    StateDict,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch.distributed.checkpoint.default_planner import _validate_global_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from megavl.checkpoint import collective_errors
from megavl.checkpoint.safe_unpickle import METADATA, check_backend, read_common, read_metadata
from megavl.checkpoint.shard_loads import load_shards
from megavl.checkpoint.shares import Part, ShardId, divide, may_write
from megavl.checkpoint.verification import verify_together
from megavl.config.errors import CheckpointError, MegaVLError, one_line

_LISTED = 5
"""Most keys that one message lists."""


@dataclass(frozen=True, kw_only=True)
class SplitState:
    """A state that is ready to be saved."""

    entries: list[ShardedBase]
    """Shards of this rank, factories applied."""
    bases: list[ShardedBase]
    """The same without data."""
    common: StateDict
    """What all ranks share."""
    size: int
    """Bytes that all ranks together will write."""
    parts: dict[ShardId, list[Part]]
    """Who writes which rows of each tensor."""


def split_state(state: ShardedStateDict, *, last: SplitState | None = None) -> SplitState:
    """Separate the shards from the state that all ranks share, and check them. Collective; `state` is unchanged.

    Args:
        last: of the save before. If the shards are the same on all ranks, nothing is exchanged and divided again.

    Raises:
        CheckpointError: the shards of all ranks do not cover every tensor exactly once.
    """
    split: list[tuple[list[ShardedBase], StateDict]] = []

    def inspect() -> bool:
        sharded, common = save_preprocess(_copy_containers(state), validate_access_integrity=False)
        split.append((list(nested_values(sharded)), common))
        return last is not None and [entry.without_data() for entry in split[0][0]] == last.bases

    known = all(collective_errors.on_every_rank(inspect))
    entries, common = split[0]
    if known and last is not None:
        return replace(last, entries=entries, common=common)
    gathered = collective_errors.on_every_rank(lambda: [entry.without_data() for entry in entries])
    _check_sharding(gathered, source="state")
    return SplitState(
        entries=entries,
        bases=[entry.without_data() for entry in entries],
        common=common,
        size=sum(_written_bytes(entry) for bases in gathered for entry in bases),
        parts=divide([[entry for entry in bases if may_write(entry)] for bases in gathered]),
    )


def _written_bytes(entry: ShardedBase) -> int:
    if not isinstance(entry, ShardedTensor) or not is_main_replica(entry.replica_id):
        return 0
    return prod(entry.local_shape) * int(entry.dtype.itemsize)


def load_state(
    path: str | Path,
    state: ShardedStateDict,
    *,
    strict: bool = True,
    convert_dtype: bool = False,
    skip_hash: bool = False,
) -> StateDict:
    """Load a checkpoint into `state` (any layout of ranks). Collective over an initialised process group.

    The tensors of `state` are filled in place. Keys, shapes and types are compared on all ranks before the first
    byte is loaded. So a mismatch changes nothing and raises the same error on every rank.

    Args:
        state: sharded state dict of the model (prefix `model.`), and of the optimizer where wanted.
        strict: every stored entry must be asked for. If False, whole parts that `state` does not touch are ignored. The
            part of a key is its text before the first dot, such as `optimizer`.
        convert_dtype: allow a tensor to be stored in another type than asked for, e.g. bf16 weights into fp32.
        skip_hash: check sizes only, not hashes.

    Returns:
        `state` with loaded values in place of the sharded ones, and the common part of the checkpoint beside them.

    Raises:
        CheckpointError: damaged, hostile, or not what `state` asks for, naming file and key.
    """
    path = Path(path)
    verify_together(path, skip_hash=skip_hash)
    read: list[tuple[Metadata, StateDict]] = []

    def inspect() -> list[ShardedBase]:
        check_backend(path)
        read.append((read_metadata(path), read_common(path)))
        entries: list[Any] = list(nested_values(extract_sharded_base(load_preprocess(state)[0])[0]))
        for entry in entries:
            _check_entry(entry, read[0][0], path=path, convert_dtype=convert_dtype)
        return [entry.without_data() for entry in entries]

    asked = collective_errors.on_every_rank(inspect)
    metadata, common = read[0]
    _check_left_over(asked, metadata, path=path, strict=strict)
    _check_sharding(asked, source=str(path))
    try:
        # What megatron-core's `load` does, with our reader, which no release may replace by one that unpickles.
        sharded, plain, factories = load_preprocess(state)
        shards, _ = extract_sharded_base(sharded)
        merge(common, plain)
        merge(common, load_shards(shards, path, metadata=metadata, asked=asked))
        loaded: StateDict = apply_factory_merges(common, factories)
    except MegaVLError:
        raise
    except (CheckpointingException, ValueError) as error:
        raise CheckpointError(f"{path}: {one_line(error, limit=300)}") from error
    return loaded


def _check_entry(entry: Any, metadata: Metadata, *, path: Path, convert_dtype: bool) -> None:
    key = entry.unique_key if isinstance(entry, ShardedObject) else entry.key
    stored = metadata.state_dict_metadata.get(key)
    if stored is None:
        raise CheckpointError(f"{path / METADATA}: {key} is asked for but not in the checkpoint{_other_count(entry)}")
    if isinstance(entry, ShardedObject) or not isinstance(stored, TensorStorageMetadata):
        if isinstance(entry, ShardedObject) != isinstance(stored, BytesStorageMetadata):
            raise CheckpointError(f"{path / METADATA}: {key} is stored as {type(stored).__name__}")
        return
    if tuple(stored.size) != tuple(entry.global_shape):
        raise CheckpointError(
            f"{path / METADATA}: {key} has shape {tuple(stored.size)}, the model expects {tuple(entry.global_shape)}"
        )
    if stored.properties.dtype != entry.dtype and not convert_dtype:
        raise CheckpointError(
            f"{path / METADATA}: {key} is stored as {stored.properties.dtype}, the model expects {entry.dtype}; "
            "use the precision of the checkpoint, or allow the conversion"
        )


def _other_count(entry: Any) -> str:
    if not isinstance(entry, ShardedObject):
        return ""
    return "; objects of one rank each need the number of ranks that saved them"


def _check_left_over(asked: list[list[ShardedBase]], metadata: Metadata, *, path: Path, strict: bool) -> None:
    keys = {entry.unique_key if isinstance(entry, ShardedObject) else entry.key for bases in asked for entry in bases}
    # Extra states are empty, and with Transformer Engine another module than without it may have one.
    left = sorted(key for key in set(metadata.state_dict_metadata) - keys if "._extra_state/" not in key)
    if not strict:
        parts = {_part(key) for key in keys}
        left = [key for key in left if _part(key) in parts]
    if left:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        raise CheckpointError(
            f"{path / METADATA}: in the checkpoint but not asked for: {', '.join(left[:_LISTED])}{more}; "
            "is the model of another configuration?"
        )


def _part(key: str) -> str:
    return re.split(r"[./]", key, maxsplit=1)[0]


def _check_sharding(bases: list[list[ShardedBase]], *, source: str) -> None:
    def check() -> None:
        if collective_errors.world_size() == 1 and not bases[0]:
            return
        try:
            validate_sharding_integrity(bases)
            _check_uneven(bases)
        except (CheckpointingException, AssertionError) as error:
            text = one_line(error, limit=400)
            raise CheckpointError(f"{source}: the ranks do not cover every tensor exactly once: {text}") from error

    collective_errors.on_rank_zero(check)


def _check_uneven(bases: list[list[ShardedBase]]) -> None:
    """Check what megatron-core does not: shards of different sizes, such as those of a flattened range."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    wholes: dict[str, tuple[int, ...]] = {}
    for entry in (entry for entries in bases for entry in entries):
        if isinstance(entry, ShardedTensor) and not entry.has_regular_grid and is_main_replica(entry.replica_id):
            sizes = torch.Size((1,) * entry.prepend_axis_num + tuple(entry.local_shape))
            chunks.setdefault(entry.key, []).append(ChunkStorageMetadata(torch.Size(entry.global_offset), sizes))
            wholes[entry.key] = tuple(entry.global_shape)
    whole = Metadata(
        {
            key: TensorStorageMetadata(TensorProperties(), torch.Size(shape), chunks[key])
            for key, shape in wholes.items()
        }
    )
    # It compares volumes only if there are several plans; their content does not matter.
    problems = _validate_global_plan([SavePlan([])] * 2, whole)
    if problems:
        raise CheckpointingException(problems[0])


def _copy_containers(node: Any) -> Any:
    """Copy nested dicts and lists, so that factories are not applied to the caller's objects."""
    if isinstance(node, dict):
        return {key: _copy_containers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_copy_containers(value) for value in node]
    return node
