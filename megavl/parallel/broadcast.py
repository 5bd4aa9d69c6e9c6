"""One rank loads, its model-parallel peers receive: a step's micro-batches before the schedule starts.

Everything is exchanged before the first forward pass: a broadcast inside the pipeline schedule would wait for a stage
that itself waits for the sender's activations.
"""

from __future__ import annotations

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


def share_tensor(tensor: torch.Tensor | None, *, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Send a tensor from the source to every pipeline stage's ranks; it arrives on the device."""
    return _share(tensor, shape, dtype, src=mpu.get_model_parallel_src_rank(), group=mpu.get_model_parallel_group())


def share_with_first_stage(tensor: torch.Tensor | None, *, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Send a tensor to the tensor-parallel ranks of the first stage; other stages get an empty one, untransferred."""
    if not mpu.is_pipeline_first_stage():
        return torch.empty((0, *shape[1:]), dtype=dtype, device=cpu_runtime.device())
    src, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
    return _share(tensor, shape, dtype, src=src, group=group)


def scatter_images(tensor: torch.Tensor | None, *, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Cut the first axis of a tensor of the source into one share for each rank of its model-parallel group."""
    group, device = mpu.get_model_parallel_group(), cpu_runtime.device()
    send = [len(part) for part in shares(shape[0], ranks=group.size())]
    receive = [0] * group.size()
    receive[dist.get_group_rank(group, mpu.get_model_parallel_src_rank())] = send[group.rank()]
    if tensor is None:
        tensor, send = torch.empty((0, *shape[1:]), dtype=dtype), [0] * group.size()
    else:
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype, f"{tensor.shape} {tensor.dtype}, not {shape}"
    return exchange_images(tensor.to(device, non_blocking=True), send=send, receive=receive, group=group)


def _share(
    tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, *, src: int, group: dist.ProcessGroup
) -> torch.Tensor:
    device = cpu_runtime.device()
    if tensor is None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
    assert tuple(tensor.shape) == shape and tensor.dtype == dtype, f"{tensor.shape} {tensor.dtype}, not {shape} {dtype}"
    tensor = tensor.to(device, non_blocking=True).contiguous()
    if tensor.numel() and group.size() > 1:
        dist.broadcast(tensor, src=src, group=group)
    return tensor
