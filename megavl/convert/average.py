"""Mean of the weights of several models, such as the last checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from megavl.config.errors import CheckpointError, UsageError
from megavl.config.identity import model_changes
from megavl.convert.open_weights import WeightSource
from megavl.weights.lazy import LazyTensor


def average(models: Sequence[WeightSource]) -> dict[str, LazyTensor]:
    """Every parameter as the mean over models, read and computed one parameter at a time.

    A mean is summed in float64 and rounded once. Its type is the one that holds every model's: of bfloat16 and float32,
    float32.

    Raises:
        UsageError: fewer than two models, one model twice, or models of other sizes or settings.
        CheckpointError: a model lacks a parameter that another has.
    """
    first, *others = models
    if not others:
        raise UsageError(f"{first.path}: one model; give two or more to average")
    paths = [model.path.resolve() for model in models]
    for model in models:
        if paths.count(model.path.resolve()) > 1:
            raise UsageError(f"{model.path}: given twice, so it would count twice; give each model once")
    for model in others:
        differing, _ = model_changes(first.config, model.config)
        if differing:
            change = differing[0]
            raise UsageError(
                f"{model.path}: {change.key} is {change.new}, in {first.path} it is {change.old}; only checkpoints of "
                "one model can be averaged"
            )
        _require_same_parameters(first, model)
    return {name: _mean([model.tensors[name] for model in models]) for name in first.tensors}


def _require_same_parameters(first: WeightSource, other: WeightSource) -> None:
    for one, two in ((first, other), (other, first)):
        if missing := [name for name in one.tensors if name not in two.tensors]:
            raise CheckpointError(f"{two.path}: has no tensor {missing[0]!r}, which {one.path} has")
    for name, tensor in first.tensors.items():
        if (shape := other.tensors[name].shape) != tensor.shape:
            raise CheckpointError(f"{other.path}: {name!r} has shape {list(shape)}, not {list(tensor.shape)}")


def _mean(tensors: Sequence[LazyTensor]) -> LazyTensor:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return LazyTensor(shape=tensors[0].shape, dtype=dtype, load=partial(_load_mean, tensors, dtype=dtype))


def _load_mean(tensors: Sequence[LazyTensor], *, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor.load()
    return total.div_(len(tensors)).to(dtype)
