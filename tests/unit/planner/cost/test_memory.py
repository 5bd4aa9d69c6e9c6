"""Memory estimates: parameters add up, recompute keeps less, micro-batches in flight are counted."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from megavl.config.recipe import Recipe, RecomputeConfig
from megavl.planner.cost.memory import RankMemory, outstanding, rank_memory, rank_parameters, tower_parameters
from megavl.planner.layouts.check import checked_layout
from megavl.planner.scenario import Scenario, make_scenario
from megavl.planner.simulation.simulate import simulate
from megavl.planner.simulation.times import Pass
from tests.unit.planner.recipes import parameter_counts, recipe_of


def recipe(**changes: Any) -> Recipe:
    arguments: dict[str, Any] = {"tensor": 4, "pipeline": 4, "sequence_parallel": True, "batch": 256}
    return recipe_of(**{**arguments, **changes})


def memory(given: Recipe, *, rank: int = 1, layers: int = 8, data_parallel: int = 4, images: float = 5) -> RankMemory:
    world = data_parallel * given.parallel.tensor * given.parallel.pipeline
    scenario = make_scenario(given, devices=world, images=images)
    return rank_memory(scenario, rank, (layers,) * given.stages)


def test_parameters_of_ranks_add_up_to_the_model() -> None:
    for sizes in ({"pipeline": 4}, {"pipeline": 4, "virtual_pipeline": 2}, {}):
        given = recipe_of(**sizes)
        scenario, layout = make_scenario(given), checked_layout(make_scenario(given), None)
        counts = parameter_counts(given.model)
        ranks = [rank_parameters(scenario, rank, layout) for rank in range(scenario.pipeline)]
        assert sum(every for every, _ in ranks) == sum(counts.values())
        assert sum(trained for _, trained in ranks) == sum(counts[part] for part in given.trainable_parts)


def test_tensor_ranks_split_only_the_decoder_matrices() -> None:
    def of_tensor(tensor: int, rank: int) -> int:
        given = recipe(tensor=tensor, sequence_parallel=tensor > 1)
        return rank_parameters(make_scenario(given), rank, (8, 8, 8, 6))[0]

    norms = 8 * 2 * 4096
    assert of_tensor(4, 1) - norms == (of_tensor(1, 1) - norms) // 4
    vision = 7_331_390_721 - 6_910_365_696
    assert of_tensor(4, 0) - norms - vision == (of_tensor(1, 0) - norms - vision) // 4


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_recompute_lowers_activations_step_by_step(rank: int) -> None:
    modes = (
        RecomputeConfig(),
        RecomputeConfig(granularity="selective"),
        RecomputeConfig(granularity="selective", modules=("core_attn", "mlp")),
        RecomputeConfig(granularity="full"),
    )
    sizes = [memory(recipe(recompute=mode), rank=rank).activations for mode in modes]
    assert sizes == sorted(set(sizes), reverse=True)


def test_activations_grow_with_layers_micro_batches_and_images() -> None:
    assert memory(recipe(), layers=9).activations > memory(recipe(), layers=8).activations
    assert memory(recipe(), rank=1).activations > memory(recipe(), rank=2).activations
    assert memory(recipe(batch=4)).activations < memory(recipe()).activations
    by_images = [memory(recipe(), rank=0, images=images).activations for images in range(4)]
    assert by_images == sorted(set(by_images))


def test_sequence_parallel_saves_memory() -> None:
    assert memory(recipe()).activations < memory(recipe(sequence_parallel=False)).activations


def test_trained_encoders_keep_activations_unless_recomputed() -> None:
    frozen = memory(recipe(), rank=0).activations
    trained = memory(recipe(stage=3), rank=0).activations
    recomputed = memory(recipe(stage=3, recompute=RecomputeConfig(vision=True)), rank=0).activations
    assert frozen < recomputed < trained


def test_split_encoders_take_memory_off_the_first_stage() -> None:
    """Of a micro-batch's 5 images a rank keeps 2 under `split_tp`; `split_all` keeps features instead, and copies."""
    placed = {name: recipe(stage=3, vision=name) for name in ("recompute", "split_tp", "split_all")}
    first = {name: memory(given, rank=0).activations for name, given in placed.items()}
    assert first["split_tp"] < first["recompute"]
    copies = memory(placed["split_all"], rank=1).weights - memory(placed["recompute"], rank=1).weights
    assert copies == 2 * tower_parameters(make_scenario(placed["split_all"], devices=16))[0]
    assert memory(placed["split_all"], rank=1).optimizer == memory(placed["recompute"], rank=1).optimizer


def test_split_encoders_encode_few_images_at_once() -> None:
    """Images of a share keep their pixels; if a tower trains, also features and what SAM's trained end needs."""
    each = {}
    for train in (("llm", "adaptor"), ("llm", "adaptor", "siglip"), ("llm", "adaptor", "siglip", "sam_downsamples")):
        few, many = (recipe(train=train, vision="split_all", batch=batch) for batch in (64, 256))
        scenarios = [make_scenario(given, devices=16) for given in (few, many)]
        assert [scenario.images_up_front("multimodal") for scenario in scenarios] == [20, 80]
        first, inner = (
            [memory(given, rank=rank, data_parallel=1).activations for given in (few, many)] for rank in (0, 1)
        )
        each[train] = (inner[1] - inner[0]) / 60
        features = 5 * (256 - 64) * scenarios[0].feature_bytes * (1 if len(train) == 2 else 2)
        assert first[1] - first[0] == pytest.approx(features + inner[1] - inner[0], rel=1e-6)
    frozen, siglip, ends = each.values()
    assert frozen == 3 * 1024**2
    assert siglip == frozen + 2 * 2 * 576 * 1024 + 2 * 3 * 384**2
    assert siglip < ends < siglip + 100e6


@pytest.mark.parametrize(("precision", "element", "state"), [("bf16", 2, 12), ("fp32", 4, 8)])
def test_weights_gradients_and_optimizer_state(precision: str, element: int, state: int) -> None:
    given = recipe(precision=precision)
    found = memory(given, data_parallel=4)
    parameters, trained = rank_parameters(make_scenario(given, devices=64), 1, (8, 8, 8, 6))
    assert parameters == trained, "an inner stage holds trained decoder layers only"
    assert found.weights == parameters * element
    assert found.gradients == 4 * trained
    assert found.optimizer == trained * state // 4
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations


def test_without_distributed_optimizer_replicas_hold_whole_state() -> None:
    whole = memory(recipe(distributed_optimizer=False, overlap_param_gather=False), data_parallel=4)
    shared = memory(recipe(), data_parallel=4)
    assert whole.optimizer == 4 * shared.optimizer
    assert (whole.weights, whole.gradients, whole.activations) == (shared.weights, shared.gradients, shared.activations)


def test_a_frozen_language_model_has_no_gradients() -> None:
    found = memory(recipe(stage=1))
    assert (found.gradients, found.optimizer) == (0, 0)
    assert found.weights > 0


@pytest.mark.parametrize(
    ("pipeline", "virtual", "count"), [(1, 1, 3), (4, 1, 2), (4, 1, 9), (4, 2, 12), (3, 3, 9), (2, 2, 2)]
)
def test_micro_batches_in_flight_equal_the_simulation(pipeline: int, virtual: int, count: int) -> None:
    draw = random.Random(0)
    costs = [Pass(draw.random(), draw.random()) for _ in range(pipeline * virtual)]
    run = simulate(pipeline=pipeline, virtual=virtual, costs=[costs], kinds=[0] * count)
    for rank in range(pipeline):
        rows = outstanding(rank, pipeline=pipeline, virtual=virtual, micro_batches=count)
        held, peak = [0] * virtual, 0
        for event in run.events:
            if event.rank == rank:
                held[event.step.stage // pipeline] += -1 if event.step.backward else 1
                peak = max(peak, sum(held))
                assert any(all(a >= b for a, b in zip(row, held)) for row in rows)
        assert peak == max(sum(row) for row in rows)


def test_interleaving_holds_more_micro_batches_than_1f1b() -> None:
    def first_rank(virtual: int) -> int:
        given = recipe(virtual_pipeline=virtual, train=("llm",), fraction=0.0)
        scenario: Scenario = dataclasses.replace(make_scenario(given, devices=16), images=0.0)
        return rank_memory(scenario, 0, (32 // (4 * virtual),) * (4 * virtual)).activations

    assert first_rank(1) < first_rank(2)
