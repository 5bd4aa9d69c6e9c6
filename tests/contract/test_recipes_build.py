"""Every shipped recipe's model builds on the meta device, with the published number of parameters in each group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megavl.config.load import load_recipe
from megavl.config.model import ModelConfig
from megavl.config.recipe import ParallelConfig
from megavl.model.build import BuildSpec
from megavl.model.trainable import part_of
from megavl.model.vl_model import DeepseekVL
from megavl.parallel import groups

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
MODELS = ("1b", "7b", "tiny")

# Instantiated from the released configurations; SigLIP without its attention pool, which never runs.
PUBLISHED = {
    "1b": {"llm": 1_652_656_128, "adaptor": 6_295_552, "siglip": 303_688_704},
    "7b": {
        "llm": 6_910_365_696,
        "adaptor": 20_979_712,
        "siglip": 303_688_704,
        "sam_trunk": 88_883_456,
        "sam_neck": 787_456,
        "sam_hd": 787_457,
        "sam_downsamples": 5_898_240,
    },
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A world of one process, which megatron-core needs to build a model."""
    groups.start(ParallelConfig(), seed=0)
    yield
    groups.stop()


def count_parameters_on_meta(model: ModelConfig) -> dict[str, int]:
    """Parameters of every group of the whole model, which takes no memory on the meta device."""
    config = BuildSpec(model=model).transformer_config()
    with torch.device("meta"):
        whole = DeepseekVL(config, model, pre_process=True, post_process=True)
    counts: dict[str, int] = {}
    for name, parameter in whole.named_parameters():
        assert parameter.is_meta, f"{name} was allocated"
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_builds(name: str) -> None:
    models = [load_recipe(path).model for path in sorted((RECIPES / name).glob("stage*.yaml"))]
    assert all(model == models[0] for model in models)
    counts = count_parameters_on_meta(models[0])
    assert counts == PUBLISHED.get(name, counts)
    assert all(count > 0 for count in counts.values())
