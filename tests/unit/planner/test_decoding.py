"""Images per second, the processes that decode them, and those ahead."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megavl.config.errors import UsageError
from megavl.config.load import load_recipe
from megavl.config.recipe import Recipe
from megavl.planner.decoding import DECODED_PER_SECOND
from megavl.planner.report.text import render
from tests.unit.planner.recipes import plan_recipe, recipe_of


def with_data(recipe: Recipe, **data: object) -> Recipe:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **data))


def test_rate_is_the_mixture_of_one_replica() -> None:
    plan = plan_recipe(recipe_of(fraction=0.3, batch=64), devices=8, device="h100")
    images = 0.3 * 64 / plan.data_parallel * plan.images_per_sequence
    assert plan.decoding.images_per_second == pytest.approx(images / plan.expected.seconds)


def test_more_images_take_more_processes() -> None:
    slow = plan_recipe(recipe_of("7b", batch=256), devices=8, device="a100").decoding
    fast = plan_recipe(recipe_of("tiny-siglip", fraction=1.0, stage=1, batch=256), devices=1, device="h200").decoding
    assert slow.workers == 1
    assert fast.images_per_second > 10 * DECODED_PER_SECOND
    assert fast.workers * DECODED_PER_SECOND >= 1.5 * fast.images_per_second
    assert (slow.prefetched, fast.prefetched) == (320, 512)
    assert plan_recipe(recipe_of(batch=1), devices=1, device="h200").decoding.prefetched == 64


def test_the_recipe_wins() -> None:
    plan = plan_recipe(with_data(recipe_of(), num_workers=0, prefetch_images=7), devices=8, device="h100")
    assert (plan.decoding.workers, plan.decoding.prefetched) == (0, 7)
    text = render(plan)
    assert "in 0 processes (data.num_workers), up to 7 ahead (data.prefetch_images)" in text
    assert "on the cores of its GPU's NUMA node" in text


def test_text_alone_decodes_nothing() -> None:
    plan = plan_recipe(recipe_of(fraction=0.0), devices=8, device="h100")
    assert plan.decoding.images_per_second == 0
    assert "decoded" not in render(plan)


def test_another_word_than_auto_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {preset: 7b}\noptimizer: {lr: 1.0e-4}\nrun: {dir: run}\n"
        "data: {sources: [{path: d}], tokenizer: t, seq_length: 4096, multimodal_fraction: 0.3, num_workers: many}\n"
        "training: {stage: 2, steps: 10, global_batch_size: 8}\n"
    )
    with pytest.raises(UsageError, match=r"data\.num_workers.*many"):
        load_recipe(file)
