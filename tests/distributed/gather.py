"""Puts sharded tensors of all ranks together under the names of a one-rank checkpoint, and takes them apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megavl.train.model_chunks import ModelChunks


def complete_gradients(model: ModelChunks) -> None:
    """After a reduce-scatter each data-parallel rank holds its share of a bucket; fetch the others."""
    if not model.chunks[0].ddp_config.use_distributed_optimizer:
        return
    for buffer in (buffer for chunk in model.chunks for buffer in chunk.buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def vision_state(model: ModelChunks, optimizer: ChainedOptimizer) -> dict[str, torch.Tensor]:
    """Copies of what this rank holds of the vision side, by `NAME KEY`; all ranks together hold everything.

    Names decide, not the optimizer's groups: a weight in a wrong group must show. Keys are `weight`, of a trained one
    only the share that this rank updates (the rest may still wait to be gathered), and `master`, `exp_avg`,
    `exp_avg_sq` and `step` of that share.
    """
    found = {}
    for name, weight in (pair for chunk in model.chunks for pair in chunk.module.named_parameters()):
        if not name.startswith("vision."):
            continue
        if not weight.requires_grad:
            found[f"{name} weight"] = weight
        for part in optimizer.chained_optimizers if weight.requires_grad else ():
            if not isinstance(part, DistributedOptimizer):
                share, master = weight, getattr(weight, "main_param", weight)
            elif (place := part.model_param_group_index_map.get(weight)) is not None:
                own = part._get_model_param_range_map(weight)["param"]
                share = weight.view(-1)[own.start : own.end]
                master = part.optimizer.param_groups[place[0]]["params"][place[1]]
            else:
                continue
            state = {"weight": share, "master": master, **part.optimizer.state[master]}
            found |= {f"{name} {key}": value for key, value in state.items()}
    return {key: value.detach().clone() for key, value in found.items()}


def own_state(model: ModelChunks, optimizer: ChainedOptimizer) -> dict[str, torch.Tensor]:
    """Copies of this rank's weights, and of its share of master weights, moments and step counts."""
    model.gather_weights()
    found = {name: weight.detach().clone() for name, weight in model.chunks[0].module.named_parameters()}
    (part,) = optimizer.chained_optimizers
    masters = [weight for group in part.param_groups for weight in group["params"]]
    for index, master in enumerate(masters):
        kept = {"master": master, **part.optimizer.state[master]}
        found |= {f"{index} {key}": value.detach().clone() for key, value in kept.items()}
    return found


def gather_counts(counts: dict[str, int]) -> dict[str, int]:
    """Sums over all ranks. Collective."""
    total = torch.tensor(list(counts.values()))
    dist.all_reduce(total)
    return dict(zip(counts, total.tolist(), strict=True))


@torch.no_grad()
def scatter(model: ModelChunks, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy each rank's shares of whole weights, under the names of a checkpoint, into its modules."""
    state: Any = {str(i): chunk.module.sharded_state_dict(prefix="model.") for i, chunk in enumerate(model.chunks)}
    state, _ = extract_sharded_tensors_and_factories(state)
    # Their pieces are views.
    apply_factories(state)
    for item in nested_values(state):
        shape = tuple(item.data.shape if item.prepend_axis_num else item.local_shape)
        places = [slice(start, start + size) for start, size in zip(item.global_offset[-len(shape) :], shape)]
        whole = weights[item.key]
        for position in item.global_offset[: len(item.global_offset) - len(shape)]:
            whole = whole[position]
        item.data.copy_(whole[tuple(places)])
    if model.encoders is not None:
        model.encoders.copy_weights()


def _unpacked(shapes: list[Any], flat: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    parts = flat.split([math.prod(local) for *_, local in shapes])
    for (key, shape, offset, local), part in zip(shapes, parts, strict=True):
        yield key, shape, offset, part.view(local)


def gather(model: ModelChunks, *, what: str, replicas_agree: bool = True) -> dict[str, torch.Tensor] | None:
    """Global tensors on rank 0, None elsewhere.

    Args:
        model: this rank's.
        what: `grad` for gradients (zeros where a weight is frozen), `weight` for weights.
        replicas_agree: whether every rank must hold the same numbers of what several hold.
    """
    state: Any = {str(i): chunk.module.sharded_state_dict(prefix="") for i, chunk in enumerate(model.chunks)}
    state, _ = extract_sharded_tensors_and_factories(state)
    by_storage = {p.data_ptr(): p for chunk in model.chunks for p in chunk.module.parameters()}
    for item in nested_values(state):
        parameter = by_storage[item.data.data_ptr()]
        if what == "grad":
            found = getattr(parameter, "main_grad", None)
            item.data = torch.zeros_like(parameter) if found is None else found.view_as(parameter)
        wide = torch.promote_types(item.data.dtype, torch.float32)
        item.data = item.data.detach().to("cpu", wide, copy=True)
    apply_factories(state)
    found = [item for item in nested_values(state) if isinstance(item, ShardedTensor)]
    shapes = []
    for item in found:
        local = tuple(item.data.shape if item.prepend_axis_num else item.local_shape)
        shapes.append((item.key, tuple(item.global_shape), tuple(item.global_offset), local))
    # One tensor: pickling hundreds takes as long as a step.
    pieces = shapes, torch.cat([s.data.flatten() for s in found])
    box: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(pieces, box, dst=0)
    if box is None:
        return None
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in (piece for rank in box for piece in _unpacked(*rank)):
        target = whole.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
        lead = target
        for position in offset[: len(shape) - data.dim()]:
            lead = lead[position]
        where = tuple(slice(o, o + n) for o, n in zip(offset[len(shape) - data.dim() :], data.shape))
        present = lead[where]
        if not torch.isnan(present).any():
            assert not replicas_agree or torch.equal(present, data), f"replicas of {key} differ"
        lead[where] = data
    missing = [key for key, tensor in whole.items() if torch.isnan(tensor).any()]
    assert not missing, f"no rank holds all of {missing}"
    return whole
