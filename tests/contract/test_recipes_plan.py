"""Every shipped recipe can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavl.config.load import load_recipe
from tests.unit.planner.recipes import plan_recipe

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
STAGES = sorted(RECIPES.glob("*/stage*.yaml"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_plans(path: Path) -> None:
    recipe = load_recipe(path)
    devices = recipe.parallel.tensor * recipe.parallel.pipeline
    assert plan_recipe(recipe, devices=devices) is not None
