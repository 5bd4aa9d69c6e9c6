"""The plan's arithmetic and the command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megavl.config.errors import UsageError
from megavl.config.load import load_recipe
from megavl.main.open_recipe import open_recipe
from megavl.main.plan import add_arguments, run
from megavl.planner.cost.flops import MFU_CONVENTION, mfu, step_flops
from megavl.planner.hardware.devices import DEVICES
from megavl.planner.layouts.check import checked_layout
from megavl.planner.plan import to_json
from megavl.planner.report.text import render
from megavl.planner.scenario import make_scenario
from tests.unit.planner.recipes import plan_recipe

RECIPE = """
model: {preset: 7b}
parallel: {tensor: 4, pipeline: 4, sequence_parallel: true}
optimizer: {lr: 4.2e-5}
data: {sources: [{path: data}], tokenizer: tok, seq_length: 4096, multimodal_fraction: 0.3}
training: {stage: 2, steps: 42000, global_batch_size: 2304}
run: {dir: run}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "7b.yaml"
    file.write_text(RECIPE)
    return file


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def test_the_mean_is_weighted_by_the_mixture(path: Path) -> None:
    recipe = load_recipe(path)
    plan = plan_recipe(recipe, devices=64, device="a100")
    assert plan.micro_batches == 2304 // 4
    assert plan.expected.seconds == pytest.approx(0.3 * plan.multimodal.seconds + 0.7 * plan.text.seconds)
    assert plan.expected.tokens_per_s == pytest.approx(2304 * 4096 / plan.expected.seconds)
    assert plan.days == pytest.approx(42_000 * plan.expected.seconds / 86_400)
    assert plan.text.flops == step_flops(
        recipe.model, seq_length=4096, sequences=2304, images=0, trainable_parts=recipe.trainable_parts
    )
    assert plan.text.mfu == mfu(plan.text.flops, seconds=plan.text.seconds, devices=64, peak_flops=312e12)


def test_step_time_is_schedule_plus_extras(path: Path) -> None:
    plan = plan_recipe(load_recipe(path), devices=64, device="a100")
    for step in (plan.text, plan.multimodal):
        assert step.seconds == pytest.approx(step.pipeline_s + sum(step.outside_s.values()))
    busy = [rank.text_busy for rank in plan.ranks]
    assert plan.text.bubble == pytest.approx(1 - sum(busy) / 4)
    assert all(0 < share <= 1 for share in busy)


def test_the_plan_shows_the_layout_that_training_takes(path: Path) -> None:
    recipe = load_recipe(path)
    for devices in (16, 512):
        plan = plan_recipe(recipe, devices=devices, device="a100")
        layout = checked_layout(make_scenario(recipe, devices=devices), DEVICES["a100"])
        assert tuple(layers for rank in plan.ranks for layers in rank.layers) == layout


def test_devices_without_known_peak_have_no_mfu(path: Path) -> None:
    plan = plan_recipe(load_recipe(path, overrides=["training.precision=fp32"]), devices=16, device="cpu")
    assert plan.expected.mfu is None
    assert plan.fits is None
    assert plan.expected.seconds > 0
    assert "no MFU" in render(plan)


def test_mfu_comes_with_its_convention(path: Path) -> None:
    assert MFU_CONVENTION in render(plan_recipe(load_recipe(path), devices=16, device="h100"))
    assert json.loads(to_json(plan_recipe(load_recipe(path), devices=16)))["mfu_convention"] == MFU_CONVENTION


def test_every_assumption_is_listed(path: Path) -> None:
    plan = plan_recipe(load_recipe(path), devices=16, device="h100")
    assert len(plan.assumptions) >= 5
    assert all(line in render(plan) for line in plan.assumptions)


def test_json_holds_the_whole_plan(path: Path) -> None:
    plan = plan_recipe(load_recipe(path), devices=64)
    raw = json.loads(to_json(plan))
    assert raw["layout"] == plan.layout
    assert raw["fits"] is True
    assert [tuple(rank["layers"]) for rank in raw["ranks"]] == [rank.layers for rank in plan.ranks]
    assert raw["ranks"][0]["memory"]["total"] == plan.ranks[0].memory.total
    assert raw["expected"]["mfu"] == plan.expected.mfu


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 17}, "no multiple of parallel.tensor 4 x parallel.pipeline 4"),
        ({"devices": 0}, "--devices: 0"),
        ({"devices": 16, "images": -1}, "--images: .* have -1 images"),
    ],
)
def test_wrong_arguments_are_named(path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_recipe(load_recipe(path), **arguments)


def test_command_prints_aligned_tables_and_a_ranking(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "training.global_batch_size=64"
    assert command(str(path), small, "--devices", "32", "--device", "a100", "--mixing") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("rank "))
    assert len({len(line) for line in lines[header : header + 5]}) == 1
    assert "32 x a100: tensor 4 x pipeline 4 x data 2, 32 micro-batches a step, layout Et*8|t*8|t*8|t*6L" in lines[1]
    assert any(line.startswith("multimodal, 5 images a sequence") for line in lines)
    assert "to paste into the recipe:" in lines
    assert "randomly mixed ones" in out


def test_command_prints_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(path), "--json") == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["devices"] == 16
    assert raw["ranking"] is raw["mixing"] is None
    small = "training.global_batch_size=32"
    assert command(str(path), small, "--json", "--devices", "16", "--top", "3", "--mixing") == 0
    raw = json.loads(capsys.readouterr().out)
    assert len(raw["ranking"]["best"]) == 3
    assert raw["mixing"]["gain"] == pytest.approx(raw["mixing"]["mixed_s"] / raw["mixing"]["grouped_s"] - 1)


def test_command_draws_a_timeline(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(path), "training.global_batch_size=16", "--timeline", str(tmp_path / "step.svg")) == 0
    assert (tmp_path / "step.svg").read_text().startswith("<svg")


def test_too_little_memory_is_shown_and_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false"]
    with pytest.raises(UsageError, match="pipeline rank 0 needs .* nearest that works on 4 devices"):
        command(str(path), *one, "--devices", "4", "--device", "a100-pcie", "--top", "0")
    assert "ABOVE 90% of the" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override",
    ["parallel.tensor=3", "parallel.vision=split_tp", "parallel.layout=[1,2]", "parallel.virtual_pipeline=2"],
)
def test_impossible_layout_names_the_nearest_possible(path: Path, override: str) -> None:
    plain = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false", "parallel.layout=auto"]
    with pytest.raises(UsageError, match=r"parallel\..*; nearest that works on 16 devices: parallel\.tensor="):
        open_recipe(str(path), overrides=[*plain, override], devices=16)


def test_other_mistakes_are_left_as_they_are(path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_recipe(str(path), overrides=["optimizer.lr=-1"])
    assert "nearest" not in str(caught.value)
