"""Loads a sharded state: each byte is read by one of the ranks that need it, and sent to the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    StateDict,
)
from torch.distributed.checkpoint.metadata import Metadata

from megavl.checkpoint import collective_errors
from megavl.checkpoint.exchange import Exchange
from megavl.checkpoint.shard_reads import ShardReader
from megavl.checkpoint.shares import ShardId, rows_of, shard_id
from megavl.config.errors import CheckpointError, MegaVLError, one_line


def load_shards(
    state: ShardedStateDict, path: Path, *, metadata: Metadata, asked: Sequence[Sequence[ShardedBase]]
) -> StateDict:
    """Fill tensors in place, whatever layout has saved them, without unpickling anything freely. Collective.

    Args:
        state: shards and nothing else.
        metadata: of the checkpoint, checked.
        asked: shards that each rank asks for, without data.

    Returns:
        `state` with a tensor or object in place of each shard.

    Raises:
        CheckpointError: on all ranks, naming the file and the key that could not be read on any.
    """
    shards: dict[ShardId, list[ShardedTensor]] = {}
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            entry.init_data("cpu")
            shards.setdefault(shard_id(entry), []).append(entry)
    exchange = Exchange([[entry for entry in entries if isinstance(entry, ShardedTensor)] for entries in asked])
    objects: dict[str, Any] = {}

    def read() -> None:
        try:
            read_own()
        except MegaVLError:
            raise
        except Exception as error:
            # torch and the pickles of a forged file raise nearly anything.
            raise CheckpointError(f"{path}: {type(error).__name__}: {one_line(error)}") from error

    def read_own() -> None:
        with ShardReader(path, metadata) as reader:
            for name, (shard, *_) in shards.items():
                for start, stop in exchange.own_rows(name):
                    target, offsets = rows_of(shard, start, stop)
                    reader.fill(target, key=shard.key, offsets=offsets)
            for entry in nested_values(state):
                if isinstance(entry, ShardedObject):
                    objects[entry.unique_key] = reader.load_object(entry.unique_key)

    collective_errors.on_every_rank_for_long(read)
    exchange.run(lambda name, start, stop: rows_of(shards[name][0], start, stop)[0])
    for first, *others in shards.values():
        for other in others:
            other.data.copy_(first.data)
    return dict_list_map_outplace(  # type: ignore[no-any-return]
        lambda entry: objects[entry.unique_key] if isinstance(entry, ShardedObject) else entry.data,
        state,
    )
