"""Memory estimates, the plan's arithmetic, and the command."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megavl.config.errors import UsageError
from megavl.config.load import load_recipe
from megavl.config.recipe import Recipe
from megavl.main.plan import add_arguments, run
from megavl.planner.cost import parameter_counts, step_flops
from megavl.planner.devices import DEVICES, find_device
from megavl.planner.layout import resolve_layout, stage_costs
from megavl.planner.memory import StageMemory, stage_memory, stage_parameters
from megavl.planner.plan import pipeline_flops, plan_recipe, render, to_json

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


def memory(recipe: Recipe, *, stage: int = 1, **changes: Any) -> StageMemory:
    arguments = {"layers": 8, "data_parallel": 4, "micro_batches": 64, "images_per_sequence": 5, **changes}
    return stage_memory(recipe, stage=stage, **arguments)


def test_stage_parameters_add_up_to_the_model(path: Path) -> None:
    recipe = load_recipe(path, overrides=["parallel.tensor=1", "parallel.sequence_parallel=false"])
    counts = parameter_counts(recipe.model)
    stages = [stage_parameters(recipe, stage=i, layers=n) for i, n in enumerate(resolve_layout(recipe))]
    assert sum(all_ for all_, _ in stages) == sum(counts.values())
    assert sum(trained for _, trained in stages) == sum(counts[part] for part in recipe.trainable_parts)


def test_tensor_ranks_split_matrices_and_repeat_norms_and_encoders(path: Path) -> None:
    def of_tensor(tensor: int, stage: int) -> int:
        overrides = [f"parallel.tensor={tensor}", f"parallel.sequence_parallel={str(tensor > 1).lower()}"]
        return stage_parameters(load_recipe(path, overrides=overrides), stage=stage, layers=8)[0]

    norms = 8 * 2 * 4096
    assert of_tensor(4, 1) - norms == (of_tensor(1, 1) - norms) // 4
    vision = 7_331_390_721 - 6_910_365_696
    assert of_tensor(4, 0) - norms - vision == (of_tensor(1, 0) - norms - vision) // 4


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_recompute_lowers_activations_step_by_step(path: Path, stage: int) -> None:
    modes = (
        [],
        ["recompute.granularity=selective"],
        ["recompute.granularity=selective", "recompute.modules=[core_attn, mlp]"],
        ["recompute.granularity=full"],
    )
    sizes = [memory(load_recipe(path, overrides=mode), stage=stage).activations for mode in modes]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_activations_grow_with_layers_micro_batches_in_flight_and_images(path: Path) -> None:
    recipe = load_recipe(path)
    assert memory(recipe, layers=9).activations > memory(recipe, layers=8).activations
    assert memory(recipe, stage=1).activations > memory(recipe, stage=2).activations
    assert memory(recipe, micro_batches=1).activations < memory(recipe).activations
    by_images = [memory(recipe, stage=0, images_per_sequence=images).activations for images in range(4)]
    assert by_images == sorted(set(by_images))


def test_sequence_parallel_saves_memory(path: Path) -> None:
    without = load_recipe(path, overrides=["parallel.sequence_parallel=false"])
    assert memory(load_recipe(path)).activations < memory(without).activations


def test_trained_encoders_keep_activations_unless_recomputed(path: Path) -> None:
    frozen = memory(load_recipe(path), stage=0).activations
    trained = memory(load_recipe(path, overrides=["training.stage=3"]), stage=0).activations
    recomputed = memory(load_recipe(path, overrides=["training.stage=3", "recompute.vision=true"]), stage=0).activations
    assert frozen < recomputed < trained


@pytest.mark.parametrize(("precision", "element", "state"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_weights_gradients_and_optimizer_state(path: Path, precision: str, element: int, state: int) -> None:
    recipe = load_recipe(path, overrides=[f"training.precision={precision}"])
    found = memory(recipe, data_parallel=4)
    parameters, trained = stage_parameters(recipe, stage=1, layers=8)
    assert parameters == trained, "an inner stage holds trained decoder layers only"
    assert found.weights == parameters * element
    assert found.gradients == 4 * trained
    assert found.optimizer == trained * state // 4
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations


def test_a_frozen_language_model_has_no_gradients(path: Path) -> None:
    found = memory(load_recipe(path, overrides=["training.stage=1"]))
    assert (found.gradients, found.optimizer) == (0, 0)
    assert found.weights > 0


def test_step_time_follows_the_critical_path(path: Path) -> None:
    recipe = load_recipe(path)
    plan = plan_recipe(recipe, devices=64, device="a100", efficiency=0.4)
    costs, layout = stage_costs(recipe, images_per_sequence=5), resolve_layout(recipe)
    assert plan.micro_batches == 2304 // 4
    assert plan.bubble == 3 / (576 + 3)
    assert plan.multimodal.seconds == pipeline_flops(costs, layout=layout, micro_batches=576) / (0.4 * 312e12)
    assert plan.expected.seconds == pytest.approx(0.3 * plan.multimodal.seconds + 0.7 * (plan.text.seconds or 0))
    assert plan.expected.tokens_per_s == pytest.approx(2304 * 4096 / (plan.expected.seconds or 0))
    assert plan.text.flops == step_flops(
        recipe.model, seq_length=4096, sequences=2304, images=0, trainable_parts=recipe.trainable_parts
    )


def test_mfu_is_the_efficiency_when_nothing_is_lost(path: Path) -> None:
    """One stage, no encoders, no recompute: every FLOP is useful."""
    overrides = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false"]
    recipe = load_recipe(path, overrides=[*overrides, "data.multimodal_fraction=0", "training.train=[llm]"])
    plan = plan_recipe(recipe, devices=8, efficiency=0.45)
    assert plan.expected.mfu == pytest.approx(0.45)
    assert plan.bubble == 0
    assert plan.layout is None


def test_equal_stages_lose_exactly_the_bubble(path: Path) -> None:
    costs = dataclasses.replace(stage_costs(load_recipe(path), images_per_sequence=0), first=0.0, last=0.0)
    useful = 16 * sum(costs.of(stage, layers=8, stages=4) for stage in range(4)) / 4
    assert 1 - useful / pipeline_flops(costs, layout=(8,) * 4, micro_batches=16) == pytest.approx(3 / (16 + 3))


def test_a_device_without_a_known_peak_gets_no_step_time(path: Path) -> None:
    plan = plan_recipe(load_recipe(path), devices=16, device="cpu")
    assert plan.expected.seconds is plan.expected.tokens_per_s is plan.expected.mfu is None
    assert plan.fits is None
    assert plan.expected.flops > 0
    assert "no step time" in render(plan)


def test_too_little_memory_is_said(path: Path) -> None:
    overrides = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false"]
    recipe = load_recipe(path, overrides=[*overrides])
    plan = plan_recipe(recipe, devices=1, device="h100")
    assert plan.fits is False
    assert "ABOVE" in render(plan)
    assert plan_recipe(load_recipe(path), devices=64).fits is True


def test_json_holds_the_whole_plan(path: Path) -> None:
    plan = plan_recipe(load_recipe(path), devices=64)
    raw = json.loads(to_json(plan))
    assert raw["layout"] == plan.layout
    assert raw["fits"] is True
    assert [stage["layers"] for stage in raw["stages"]] == [stage.layers for stage in plan.stages]
    assert raw["stages"][0]["memory"]["total"] == plan.stages[0].memory.total
    assert raw["expected"]["mfu"] == plan.expected.mfu


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 17}, "no multiple of parallel.tensor 4 x parallel.pipeline 4"),
        ({"devices": 0}, "--devices: 0"),
        ({"devices": 16, "efficiency": 0.0}, "--efficiency: 0.0"),
        ({"devices": 16, "device": "tpu"}, "choose from a100, h100, h200, cpu"),
    ],
)
def test_wrong_arguments_are_named(path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_recipe(load_recipe(path), **arguments)


def test_peaks_of_known_devices() -> None:
    assert find_device("a100").peak_flops["bf16"] == 312e12
    assert find_device("h200").peak_flops["bf16"] == find_device("h100").peak_flops["bf16"] == 989.5e12
    assert not DEVICES["cpu"].peak_flops


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def test_command_prints_an_aligned_table(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(path), "training.global_batch_size=64", "--devices", "32", "--device", "a100") == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("stage "))
    assert len({len(line) for line in lines[header : header + 5]}) == 1
    assert "32 x a100: tensor 4 x pipeline 4 x data 2, 32 micro-batches a step, layout Et*6|t*8|t*9|t*7L" in lines[1]
    assert any(line.startswith("multimodal, 5 images a sequence") for line in lines)


def test_command_prints_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 16
