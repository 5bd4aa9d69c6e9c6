"""One rank loads, its model-parallel peers receive: a step's micro-batches before the schedule starts.

Everything is exchanged before the first forward pass: a broadcast inside the pipeline schedule would wait for a stage
that itself waits for the sender's activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megavl.parallel import cpu_runtime
from megavl.parallel.images import exchange_images, shares


def is_source() -> bool:
    """Whether this rank loads data for its model-parallel group (tensor x pipeline ranks of one replica)."""
    return dist.get_rank() == mpu.get_model_parallel_src_rank()


def share_object(value: Any) -> Any:
    """Send a small object from the source to its model-parallel group."""
    if mpu.get_model_parallel_group().size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(
        box,
        src=mpu.get_model_parallel_src_rank(),
        group=mpu.get_model_parallel_group(),
        device=cpu_runtime.device(),
    )
    return box[0]


def share_tensor(parts: Sequence[torch.Tensor], *, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Send parts of a tensor from the source, empty elsewhere, to every pipeline stage's ranks; it is on the device."""
    return _share(parts, shape, dtype, src=mpu.get_model_parallel_src_rank(), group=mpu.get_model_parallel_group())


def share_with_first_stage(
    parts: Sequence[torch.Tensor], *, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Send parts of a tensor to the tensor-parallel ranks of the first stage; other stages get an empty one, unsent."""
    if not mpu.is_pipeline_first_stage():
        return torch.empty((0, *shape[1:]), dtype=dtype, device=cpu_runtime.device())
    src, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
    return _share(parts, shape, dtype, src=src, group=group)


def scatter_images(parts: Sequence[torch.Tensor], *, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Cut the first axis of a tensor of the source into one share for each rank of its model-parallel group."""
    group = mpu.get_model_parallel_group()
    send = [len(part) for part in shares(shape[0], ranks=group.size())]
    receive = [0] * group.size()
    receive[dist.get_group_rank(group, mpu.get_model_parallel_src_rank())] = send[group.rank()]
    if not is_source():
        shape, send = (0, *shape[1:]), [0] * group.size()
    return exchange_images(_on_device(parts, shape, dtype), send=send, receive=receive, group=group)


def _on_device(parts: Sequence[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The parts along the first axis, or room for what other ranks send."""
    out = torch.empty(shape, dtype=dtype, device=cpu_runtime.device())
    start = 0
    for part in parts:
        assert part.dtype == dtype and part.shape[1:] == shape[1:], f"{part.shape} {part.dtype}, not {shape} {dtype}"
        out[start : start + len(part)].copy_(part, non_blocking=True)
        start += len(part)
    assert start in (0, shape[0]), f"{start} of {shape[0]}"
    return out


def _share(
    parts: Sequence[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, *, src: int, group: dist.ProcessGroup
) -> torch.Tensor:
    tensor = _on_device(parts, shape, dtype)
    if tensor.numel() and group.size() > 1:
        dist.broadcast(tensor, src=src, group=group)
    return tensor
