"""Sends what one rank has read to the other ranks that hold the same shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megavl.checkpoint import collective_errors
from megavl.checkpoint.shares import Part, ShardId, divide, shard_id

PACKED_BYTES = 32 << 20
"""Small tensors are sent together, up to this many bytes."""


class Exchange:
    """Which rows of its shards this rank reads, and which it gets from others.

    The rows of a shard are divided among its ranks if these are a process group that exists already. Otherwise each
    of them reads all rows, so that no groups have to be made.
    """

    def __init__(self, by_rank: Sequence[Sequence[ShardedTensor]]) -> None:
        """Divide the shards that all ranks ask for; every rank computes the same."""
        self._me = collective_errors.rank()
        self._mine = {shard_id(shard): tuple(shard.local_shape) for shard in by_rank[self._me]}
        self._parts: dict[ShardId, list[Part]] = divide(by_rank)
        self._groups = _groups()
        held: dict[ShardId, set[int]] = {}
        for rank, shards in enumerate(by_rank):
            for shard in shards:
                held.setdefault(shard_id(shard), set()).add(rank)
        self._holders = {name: tuple(sorted(held[name])) for name in self._mine}

    def own_rows(self, name: ShardId) -> list[tuple[int, int]]:
        """Ranges of rows that this rank reads."""
        parts = self._parts[name]
        if self._holders[name] in self._groups:
            return [(part.start, part.stop) for part in parts if part.rank == self._me]
        return [(parts[0].start, parts[-1].stop)]

    def run(self, rows: Callable[[ShardId, int, int], torch.Tensor]) -> None:
        """Fill the rows that other ranks have read. Collective.

        Args:
            rows: gives some rows of a shard of this rank, as a view.
        """
        together: dict[tuple[int, ...], list[ShardId]] = {}
        for name, holders in self._holders.items():
            if len(holders) > 1 and holders in self._groups:
                together.setdefault(holders, []).append(name)
        # All ranks take groups, shards and senders in the same order.
        for holders, names in sorted(together.items()):
            for sender in holders:
                parts = [(name, part) for name in sorted(names) for part in self._parts[name] if part.rank == sender]
                views = [rows(name, part.start, part.stop) for name, part in parts]
                for batch in _batches(views):
                    _broadcast(batch, sender=sender, group=self._groups[holders], sends=sender == self._me)


def _groups() -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Process groups of this rank, by their ranks."""
    if not dist.is_initialized():
        return {}
    found = [dist.distributed_c10d._get_default_group()]
    if mpu.model_parallel_is_initialized():
        found += [
            mpu.get_data_parallel_group(with_context_parallel=True),
            mpu.get_tensor_model_parallel_group(),
            mpu.get_tensor_and_data_parallel_group(with_context_parallel=True),
        ]
    return {tuple(sorted(dist.get_process_group_ranks(group))): group for group in found}


def _batches(views: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    size = 0
    for view in views:
        if batch and size + view.nbytes > PACKED_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(view)
        size += view.nbytes
    if batch:
        yield batch


def _broadcast(views: list[torch.Tensor], *, sender: int, group: dist.ProcessGroup, sends: bool) -> None:
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    if len(views) == 1 and views[0].is_contiguous() and views[0].device.type == device.type:
        # As bytes, since not every backend sends every type.
        dist.broadcast(views[0].view(-1).view(torch.uint8), src=sender, group=group)
        return
    packed = torch.empty(sum(view.nbytes for view in views), dtype=torch.uint8, device=device)
    parts = packed.split([view.nbytes for view in views])
    if sends:
        for view, part in zip(views, parts):
            part.copy_(view.contiguous().view(-1).view(torch.uint8))
    dist.broadcast(packed, src=sender, group=group)
    if not sends:
        for view, part in zip(views, parts):
            view.copy_(part.clone().view(view.dtype).view(view.shape))
