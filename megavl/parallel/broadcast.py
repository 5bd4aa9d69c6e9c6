"""One rank loads data; the tensor and pipeline ranks of its replica receive it before the schedule starts.

A broadcast inside the pipeline schedule would wait for a stage that itself waits for the sender's activations.
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


def share_tensor(value: torch.Tensor | None, *, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Send a tensor from the source, None elsewhere, to its model-parallel group; the result is on the device."""
    tensor = _on_device([] if value is None else [value], shape, dtype)
    return _broadcast(tensor, src=mpu.get_model_parallel_src_rank(), group=mpu.get_model_parallel_group())


def share_images(parts: Sequence[torch.Tensor], *, shape: tuple[int, ...], split: bool) -> tuple[range, torch.Tensor]:
    """Send a step's images from the source to the ranks that encode them.

    Args:
        parts: uint8 images of each micro-batch on the source, empty elsewhere.
        shape: (I, 3, C, C) of all images.
        split: give each rank of the model-parallel group its share; otherwise the tensor-parallel ranks of the first
            stage get all images, and other stages none.

    Returns:
        Which of the I images this rank got, and these images on the device.
    """
    if split:
        group = mpu.get_model_parallel_group()
        parted = shares(shape[0], ranks=group.size())
        send = [len(part) if is_source() else 0 for part in parted]
        receive = [0] * group.size()
        receive[dist.get_group_rank(group, mpu.get_model_parallel_src_rank())] = len(parted[group.rank()])
        images = _on_device(parts, (sum(send), *shape[1:]), torch.uint8)
        return parted[group.rank()], exchange_images(images, send=send, receive=receive, group=group)
    if not mpu.is_pipeline_first_stage():
        return range(0), _on_device((), (0, *shape[1:]), torch.uint8)
    src, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
    return range(shape[0]), _broadcast(_on_device(parts, shape, torch.uint8), src=src, group=group)


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


def _broadcast(tensor: torch.Tensor, *, src: int, group: dist.ProcessGroup) -> torch.Tensor:
    if tensor.numel() and group.size() > 1:
        dist.broadcast(tensor, src=src, group=group)
    return tensor
