"""Copies weights by name into this rank's modules: its layers, and its rows or columns of partitioned matrices."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from megavl.config.errors import CheckpointError
from megavl.weights.canonical_names import canonical_name
from megavl.weights.lazy import LazyTensor


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How tensor parallelism divides a parameter: a rank holds its share of each of `blocks` equal blocks.

    The gate and up projections of an MLP are two blocks in one matrix.
    """

    axis: int
    blocks: int
    rank: int
    size: int


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, LazyTensor],
    *,
    source: str,
    first_layer: int = 0,
    tensor_rank: int = 0,
    tensor_size: int = 1,
    elsewhere: Collection[str] = (),
) -> None:
    """Copy every weight of this rank into its modules, cast to the model's type.

    Args:
        tensors: the whole model's weights by canonical name.
        first_layer: number of the decoder layer that the stage begins with.
        tensor_rank: this rank's index among the tensor-parallel ranks.
        elsewhere: canonical names of the weights that other stages may hold.

    Raises:
        CheckpointError: a missing, unexpected or misshapen tensor; nothing has been copied then.
    """
    parameters = {canonical_name(name, first_layer=first_layer): p for name, p in model.named_parameters()}
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise CheckpointError(f"{source}: {len(missing)} weights of the model are missing: {', '.join(missing[:3])}")
    if unexpected := sorted(tensors.keys() - parameters.keys() - set(elsewhere)):
        raise CheckpointError(
            f"{source}: {len(unexpected)} tensors are not the model's: {', '.join(unexpected[:3])}; "
            "is this another model's model.json or config.json?"
        )
    partitions = {
        name: _partition(parameter, rank=tensor_rank, size=tensor_size) for name, parameter in parameters.items()
    }
    for name, parameter in parameters.items():
        wanted = _whole_shape(parameter, partitions[name])
        if tuple(tensors[name].shape) != wanted:
            raise CheckpointError(f"{source}: {name} has shape {tuple(tensors[name].shape)}, the model wants {wanted}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_load(tensors[name], partitions[name]))


def _partition(parameter: nn.Parameter, *, rank: int, size: int) -> Partition | None:
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return None
    blocks = parameter.partition_stride  # type: ignore[attr-defined]
    return Partition(axis=parameter.partition_dim, blocks=blocks, rank=rank, size=size)  # type: ignore[attr-defined]


def _whole_shape(parameter: nn.Parameter, partition: Partition | None) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if partition is not None:
        shape[partition.axis] *= partition.size
    return tuple(shape)


def _load(tensor: LazyTensor, partition: Partition | None) -> torch.Tensor:
    if partition is None:
        return tensor.load()
    block = tensor.shape[partition.axis] // partition.blocks
    share = block // partition.size
    starts = [index * block + partition.rank * share for index in range(partition.blocks)]
    parts = [tensor.load_slice(start, start + share, axis=partition.axis) for start in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=partition.axis)
