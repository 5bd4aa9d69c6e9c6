"""Weights by flat name into a one-rank model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from megavl.config.errors import CheckpointError

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine keeps a layer's norms inside the projections that follow them."""


class LazyTensor(Protocol):
    """A stored tensor that is read when asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape, known before it is read."""

    def load(self) -> torch.Tensor:
        """Read it."""


def flat_name(parameter: str) -> str:
    """Flat name of a module's parameter."""
    for fused, flat in _FUSED_NORMS.items():
        if parameter.endswith(fused):
            return parameter.removesuffix(fused) + flat
    return parameter


def load_weights(model: nn.Module, tensors: Mapping[str, LazyTensor], *, source: str) -> None:
    """Copy every weight into a model, cast to the model's type.

    Args:
        model: a one-rank model.
        tensors: exactly the model's weights by flat name.
        source: where they come from, for messages.

    Raises:
        CheckpointError: a missing, unexpected or misshapen tensor.
    """
    parameters = {flat_name(name): parameter for name, parameter in model.named_parameters()}
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise CheckpointError(f"{source}: {len(missing)} weights of the model are missing: {', '.join(missing[:3])}")
    if unexpected := sorted(tensors.keys() - parameters.keys()):
        raise CheckpointError(
            f"{source}: {len(unexpected)} tensors are not the model's: {', '.join(unexpected[:3])}; "
            "is this another model's model.json or config.json?"
        )
    for name, parameter in parameters.items():
        if tuple(tensors[name].shape) != tuple(parameter.shape):
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, the model wants {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name].load())
