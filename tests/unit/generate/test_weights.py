"""Weights into a model: exactly its own, by name and shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megavl.config.errors import CheckpointError
from megavl.convert.flat_names import flat_shapes
from megavl.convert.lazy import LoadedTensor
from megavl.generate.weights import flat_name, load_weights
from tests.unit.generate import models


def stored(**tensors: torch.Tensor) -> dict[str, LoadedTensor]:
    return {name: LoadedTensor(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("preset", models.PRESETS)
def test_names_are_the_flat_names(preset):
    with models.built(preset) as model:
        found = {flat_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
        expected = models.flat_weights(preset)
        assert all(torch.equal(p, expected[flat_name(name)].load()) for name, p in model.named_parameters())
    assert found == flat_shapes(models.config_of(preset))


def test_names_under_transformer_engine():
    layer = "language_model.decoder.layers.3"
    assert flat_name(f"{layer}.self_attention.linear_qkv.layer_norm_weight") == f"{layer}.input_layernorm.weight"
    assert flat_name(f"{layer}.mlp.linear_fc1.layer_norm_weight") == f"{layer}.pre_mlp_layernorm.weight"


def test_weights_are_cast_to_the_models_type():
    layer = nn.Linear(2, 1, dtype=torch.bfloat16)
    load_weights(layer, stored(weight=torch.tensor([[0.1, 3.0]]), bias=torch.ones(1).half()), source="x")
    assert torch.equal(layer.weight, torch.tensor([[0.1, 3.0]]).bfloat16())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(1, 2)}, "x: 1 weights of the model are missing: bias"),
        ({"weight": torch.ones(1, 2), "bias": torch.ones(1), "gain": torch.ones(1)}, "are not the model's: gain"),
        ({"weight": torch.ones(2, 1), "bias": torch.ones(1)}, r"weight has shape \(2, 1\), the model wants \(1, 2\)"),
    ],
)
def test_what_does_not_fit_changes_nothing(tensors, message):
    layer = nn.Linear(2, 1)
    before = layer.weight.clone()
    with pytest.raises(CheckpointError, match=message):
        load_weights(layer, stored(**tensors), source="x")
    assert torch.equal(layer.weight, before)
