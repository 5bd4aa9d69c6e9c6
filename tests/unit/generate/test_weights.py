"""Weights into a model: exactly its own, by name and shape."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megavl.config.errors import CheckpointError
from megavl.generate.open_model import find_model
from megavl.generate.weights import load_weights
from megavl.weights.canonical_names import canonical_name, canonical_shapes
from megavl.weights.lazy import LazyTensor
from tests.unit.generate import models


def stored(**tensors: torch.Tensor) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("preset", models.PRESETS)
def test_names_are_the_canonical_names(preset):
    with models.built(preset) as model:
        found = {canonical_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
        expected = models.random_tensors(preset)
        assert all(torch.equal(p, expected[canonical_name(name)].load()) for name, p in model.named_parameters())
    assert found == canonical_shapes(models.config_of(preset))


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


class Split(nn.Module):
    """One matrix of each kind that tensor parallelism splits, as one of two ranks holds it."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape, axis, blocks in (
            ("rows", (3, 2), 0, 1),
            ("pair", (4, 2), 0, 2),
            ("columns", (3, 2), 1, 1),
            ("whole", (2, 2), None, 1),
        ):
            parameter = nn.Parameter(torch.zeros(shape))
            if axis is not None:
                parameter.tensor_model_parallel = True
                parameter.partition_dim, parameter.partition_stride = axis, blocks
            self.register_parameter(name, parameter)


def test_each_rank_takes_its_share():
    whole = {
        "rows": torch.arange(12.0).view(6, 2),
        "pair": torch.arange(16.0).view(8, 2),
        "columns": torch.arange(12.0).view(3, 4),
        "whole": torch.arange(4.0).view(2, 2),
    }
    for rank in range(2):
        split = Split()
        load_weights(split, stored(**whole), source="x", tensor_rank=rank, tensor_size=2)
        assert torch.equal(split.rows, whole["rows"][3 * rank : 3 * rank + 3])
        gate, up = whole["pair"].chunk(2)
        assert torch.equal(split.pair, torch.cat([gate[2 * rank : 2 * rank + 2], up[2 * rank : 2 * rank + 2]]))
        assert torch.equal(split.columns, whole["columns"][:, 2 * rank : 2 * rank + 2])
        assert torch.equal(split.whole, whole["whole"])
    with pytest.raises(CheckpointError, match=r"rows has shape \(6, 2\), the model wants \(12, 2\)"):
        load_weights(Split(), stored(**whole), source="x", tensor_rank=0, tensor_size=4)


def test_weights_of_other_stages_are_ignored():
    layer = nn.Linear(2, 1)
    tensors = stored(weight=torch.ones(1, 2), bias=torch.ones(1), other=torch.ones(1))
    load_weights(layer, tensors, source="x", elsewhere=["other"])
    assert float(layer.bias) == 1.0
    with pytest.raises(CheckpointError, match="are not the model's: other"):
        load_weights(layer, tensors, source="x", elsewhere=["another"])


@pytest.mark.parametrize("form", ["native", "pickle", "original", "checkpoint"])
def test_slices_are_parts_of_the_whole(form, tokenizer_dir, tmp_path):
    """Along both axes of every matrix that ranks share; heads are never split."""
    if form == "checkpoint":
        source = find_model(models.write_checkpoint("tiny-hybrid", tmp_path / "c", tokenizer=tokenizer_dir))
    else:
        fmt = "native" if form == "pickle" else form
        folder = models.write_folder("tiny-hybrid", tmp_path / "f", tokenizer=tokenizer_dir, fmt=fmt)
        if form == "pickle":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        source = find_model(folder)
    matrices = [name for name, tensor in source.tensors.items() if len(tensor.shape) == 2 and "language" in name]
    assert len(matrices) == 2 + 4 * 4
    # The layers are alike.
    for name in (name for name in matrices if ".layers." not in name or ".layers.1." in name):
        tensor = source.tensors[name]
        whole = tensor.load()
        for axis in (0, 1):
            quarter = whole.shape[axis] // 4
            for start in (0, quarter, 2 * quarter):
                part = tensor.load_slice(start, start + quarter, axis=axis)
                assert torch.equal(part, whole.narrow(axis, start, quarter)), (name, axis, start)
        assert torch.equal(tensor.load_slice(0, whole.shape[0]), whole)
