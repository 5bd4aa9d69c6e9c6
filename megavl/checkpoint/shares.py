"""Divides shards that several ranks hold: each of them writes, or reads, an equal part of the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeGuard

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, is_main_replica

ITEM_BYTES = 1024
"""What the archive of one item takes besides its numbers."""

ShardId = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Key, offset in the whole tensor, and shape."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of a shard, which one rank writes or reads."""

    rank: int
    start: int
    stop: int


def shard_id(shard: ShardedTensor) -> ShardId:
    """What tells shards apart; replicas on other ranks have the same."""
    return shard.key, tuple(shard.global_offset), tuple(shard.local_shape)


def row_axis(shape: Sequence[int]) -> int:
    """The axis whose rows are divided: the first that has more than one. Rows of it are contiguous."""
    return next((axis for axis, size in enumerate(shape) if size > 1), 0)


def rows_of(shard: ShardedTensor, start: int, stop: int) -> tuple[torch.Tensor, list[int]]:
    """View of some rows of a shard with all axes of the whole tensor, and where it lies in that."""
    data, before, offsets = shard.data.detach(), shard.prepend_axis_num, list(shard.global_offset)
    if data.dim():
        axis = row_axis(data.shape)
        data = data.narrow(axis, start, stop - start)
        offsets[before + axis] += start
    return data[(None,) * before] if before else data, offsets


def may_write(shard: ShardedBase) -> TypeGuard[ShardedTensor]:
    """Whether a rank may write some of a tensor: it differs from the main replica in its data-parallel number only.

    Replicas of other tensor-parallel ranks are computed, not copied, and could differ in the last bit.
    """
    if not isinstance(shard, ShardedTensor):
        return False
    replica = shard.replica_id
    return is_main_replica(replica[:-1]) if isinstance(replica, tuple) else True


def divide(by_rank: Sequence[Sequence[ShardedTensor]]) -> dict[ShardId, list[Part]]:
    """Divide all shards among the ranks that hold them; every rank computes the same.

    Shards of the same ranks are laid end to end and divided into equal parts, at the ends of rows. So each rank gets
    whole shards, and a part of two others at most.

    Args:
        by_rank: shards of each rank, without data.
    """
    ranks: dict[ShardId, dict[int, ShardedTensor]] = {}
    for rank, shards in enumerate(by_rank):
        for shard in shards:
            ranks.setdefault(shard_id(shard), {})[rank] = shard
    groups: dict[tuple[int, ...], dict[ShardId, int]] = {}
    for name, held in ranks.items():
        size = prod(name[2]) * next(iter(held.values())).dtype.itemsize
        groups.setdefault(tuple(held), {})[name] = size
    parts: dict[ShardId, list[Part]] = {}
    for holders, sizes in groups.items():
        parts |= _divide_evenly(holders, sizes)
    return parts


def _divide_evenly(holders: tuple[int, ...], sizes: Mapping[ShardId, int]) -> dict[ShardId, list[Part]]:
    total, position = sum(sizes.values()) + ITEM_BYTES * len(sizes), 0
    parts: dict[ShardId, list[Part]] = {}
    for name in sorted(sizes):
        shape, cost = name[2], sizes[name] + ITEM_BYTES
        rows = shape[row_axis(shape)] if shape else 1
        ends = [_row(total * (index + 1) / len(holders), position, cost, rows) for index in range(len(holders))]
        starts = [0, *ends]
        found = [
            Part(rank=rank, start=start, stop=stop) for rank, start, stop in zip(holders, starts, ends) if start < stop
        ]
        # A tensor without elements is written too.
        parts[name] = found or [Part(rank=holders[0], start=0, stop=rows)]
        position += cost
    return parts


def _row(boundary: float, position: int, cost: int, rows: int) -> int:
    return min(rows, max(0, round((boundary - position) / cost * rows)))
