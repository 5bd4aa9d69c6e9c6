"""Every shipped recipe's model builds on the meta device, with the published number of parameters in each group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megavl.config.load import load_recipe
from megavl.config.recipe import ParallelConfig
from megavl.model.build import count_parameters_on_meta
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


@pytest.mark.parametrize("name", MODELS)
def test_builds(name: str) -> None:
    models = [load_recipe(path).model for path in sorted((RECIPES / name).glob("stage*.yaml"))]
    assert all(model == models[0] for model in models)
    counts = count_parameters_on_meta(models[0])
    assert counts == PUBLISHED.get(name, counts)
    assert all(count > 0 for count in counts.values())
