"""Rectangular boxes of tensors: byte ranges of a flat buffer as shards that any layout can load.

A shard of dist_checkpointing is a box of the whole tensor. The distributed optimizer gives each data-parallel rank a
range of the flattened weight instead, which may begin and end within a row. Such a range is a few boxes.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, elements along each axis."""


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Boxes that hold elements [start, stop) of a row-major tensor, in the order of its elements.

    Returns:
        At most `2 * len(shape) - 1` boxes, each of them contiguous in memory.
    """
    if start >= stop:
        return []
    if len(shape) < 2:
        return [((start,) * len(shape), (stop - start,) * len(shape))]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        return _in_row(shape, last, start - last * row, stop - last * row)
    whole = [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if first < last else []
    head = _in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    return head + whole + _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in boxes_of_range(shape[1:], start, stop)]


def shards_of_range(
    whole: ShardedTensor | ShardedTensorFactory, flat: torch.Tensor, *, start: int, key: str
) -> list[ShardedTensor]:
    """Shards for a range of a flattened tensor that is sharded as `whole`.

    Args:
        whole: the sharded weight on this rank; only its shapes, offsets and replica are used.
        flat: (n,) contiguous, the elements from `start` of the weight on this rank; the shards are views of it.
        start: first element.
        key: stored name. A factory may add to it.

    Returns:
        Shards in the order of the elements. Their last replica number is 0: no other data-parallel rank has them.
    """
    stop = start + flat.numel()
    shape = whole.data.shape if isinstance(whole, ShardedTensorFactory) else whole.local_shape
    # The shards that a factory makes of this are views, which say where in the weight they lie.
    position = torch.empty(tuple(shape), dtype=flat.dtype, device="meta")
    given = {} if isinstance(whole, ShardedTensorFactory) else {"dtype": flat.dtype}
    built = {"weight": replace(whole, key=key, data=position, **given)}
    apply_factories(built)
    shards: list[ShardedTensor] = []
    found = built["weight"]
    for part in found if isinstance(found, list) else [found]:
        assert part.data.is_contiguous(), f"{part.key} is not divided along its first axis"
        begin = part.data.storage_offset()
        low, high = max(start, begin), min(stop, begin + part.data.numel())
        for offsets, sizes in boxes_of_range(part.local_shape, low - begin, high - begin):
            count = prod(sizes)
            shards.append(_shard(part, flat[low - start : low - start + count].view(sizes), offsets))
            low += count
    return shards


def _shard(part: ShardedTensor, data: torch.Tensor, offsets: tuple[int, ...]) -> ShardedTensor:
    before = part.prepend_axis_num
    moved = tuple(base + offset for base, offset in zip(part.global_offset[before:], offsets))
    replica = part.replica_id
    return replace(
        part,
        data=data,
        local_shape=tuple(data.shape),
        global_offset=(*part.global_offset[:before], *moved),
        axis_fragmentations=None,
        replica_id=(*replica[:-1], 0) if isinstance(replica, tuple) else 0,
    )
