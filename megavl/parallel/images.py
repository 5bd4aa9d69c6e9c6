"""Divides images among the ranks that encode them, and exchanges features and gradients.

Legend: I images, P tokens per image, H hidden, N ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megavl.parallel import cpu_runtime


def shares(count: int, *, ranks: int) -> tuple[range, ...]:
    """Contiguous shares of `count` images, which differ by at most one; the first ranks hold the larger ones."""
    size, larger = divmod(count, ranks)
    borders = [rank * size + min(rank, larger) for rank in range(ranks + 1)]
    return tuple(range(first, end) for first, end in zip(borders, borders[1:]))


def gather_images(own: torch.Tensor, *, count: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Features of all images from the shares of a tensor-parallel group.

    The gradient that comes back is the same on every rank of the group. Each rank keeps that of its own images, times
    the number of ranks. megatron-core averages the gradients of replicated weights over the group, which then gives
    their sum.

    Args:
        own: (I of this rank's share, ...).
        count: images of all ranks.
        group: ranks that hold shares, in their order.

    Returns:
        (count, ...) on every rank.
    """
    out: torch.Tensor = _GatherImages.apply(own, count, group)
    return out


class _GatherImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, count: int, group: dist.ProcessGroup) -> torch.Tensor:
        parts = shares(count, ranks=group.size())
        ctx.share, ctx.ranks = parts[group.rank()], group.size()
        most = len(parts[0])
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: own.shape[0]] = own
        everything = own.new_empty((group.size() * most, *own.shape[1:]))
        dist.all_gather_into_tensor(everything, padded, group=group)
        return torch.cat([everything[rank * most : rank * most + len(part)] for rank, part in enumerate(parts)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient[ctx.share.start : ctx.share.stop] * ctx.ranks, None, None


def exchange_images(
    rows: torch.Tensor, *, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Uneven all-to-all over the first axis.

    Args:
        rows: what this rank sends, in the order of the receivers.
        send: rows for each rank of the group.
        receive: rows from each rank of the group.

    Returns:
        Received rows in the order of the senders.
    """
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    if group.size() == 1:
        return out.copy_(rows)
    dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send), group=group)
    return out


def sum_over(tensors: Sequence[torch.Tensor], *, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Sums of equally shaped tensors of one type over a group, in one collective."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    return [part.view_as(like) for part, like in zip(flat.split([t.numel() for t in tensors]), tensors)]


@torch.no_grad()
def copy_from(source: int, tensors: Sequence[torch.Tensor], *, group: dist.ProcessGroup) -> None:
    """Overwrite tensors of one type with those of the rank `source`, in one collective."""
    if not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).to(cpu_runtime.device())
    dist.broadcast(flat, src=source, group=group)
    for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors):
        tensor.copy_(part.view_as(tensor))
