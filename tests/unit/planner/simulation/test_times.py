"""Seconds of blocks against published throughput and the FLOPs formula, and how they depend on the layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megavl.config.recipe import RecomputeConfig
from megavl.planner.cost.blocks import decoder_layer_blocks, head_block, vision_blocks
from megavl.planner.cost.flops import MFU_CONVENTION, train_flops
from megavl.planner.cost.memory import rank_memory
from megavl.planner.cost.work import layer_work
from megavl.planner.hardware.devices import DEVICES, Link
from megavl.planner.scenario import Scenario, make_scenario
from megavl.planner.simulation.predict import step_time
from megavl.planner.simulation.times import (
    DeviceTimes,
    FlatTimes,
    Pass,
    all_reduce,
    exchange_time,
    gather_time,
)
from tests.unit.planner.recipes import all_work, plan_recipe, recipe_of

TEXT = frozenset({"llm"})


def scenario_of(**changes: object) -> Scenario:
    return make_scenario(recipe_of(**changes))  # type: ignore[arg-type]


def test_work_is_the_flops_formula() -> None:
    """On one device without recompute, FLOPs of every block equal `flops.train_flops`."""
    scenario = scenario_of(stage=3)
    found = {block.name: block.forward.flops + block.backward.flops for block in all_work(scenario, "multimodal")}
    trainable = frozenset(scenario.recipe.trainable_parts)
    layer = decoder_layer_blocks(scenario.recipe.model.llm, tokens=4096, seq_length=4096)
    assert found["decoder layer"] == train_flops(layer, trainable=trainable)
    assert found["head + loss"] == train_flops(
        [head_block(scenario.recipe.model.llm, tokens=4096 - 5 * 576)], trainable=trainable
    ), "image tokens carry no loss"
    on_text = {block.name: block.forward.flops for block in all_work(scenario, "text")}
    assert on_text["head + loss"] * 3 == train_flops(
        [head_block(scenario.recipe.model.llm, tokens=4096)], trainable=trainable
    )
    assert found["embedding"] == 0
    siglip = [block for block in vision_blocks(scenario.recipe.model) if block.name.startswith("siglip")]
    assert found["SigLIP"] == train_flops(siglip, trainable=trainable)
    sam = [block for block in vision_blocks(scenario.recipe.model) if block.name.startswith("sam")]
    assert found["SAM"] == train_flops(sam, trainable=trainable) + sum(block.overhead for block in sam)


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recompute_costs_time_and_keeps_less(granularity: str) -> None:
    def layer(recompute: RecomputeConfig) -> tuple[float, float]:
        scenario = scenario_of(recompute=recompute)
        return layer_work(scenario, "text").backward.flops, rank_memory(scenario, 0, (30,)).activations

    plain, again = layer(RecomputeConfig()), layer(RecomputeConfig(granularity=granularity, modules=("mlp",)))  # type: ignore[arg-type]
    assert again[0] > plain[0]
    assert again[1] < plain[1]


@pytest.mark.parametrize(
    ("device", "low", "high", "source"),
    [
        ("a100", 0.60, 0.70, "fms-fsdp 68% at 4,096 tokens, MPT-7B 64% at 2,048"),
        ("h100", 0.44, 0.54, "MaxText 50.1%, fms-fsdp 46% at 4,096 tokens"),
    ],
)
def test_mfu_of_7b_text_is_near_published_runs(
    device: str, low: float, high: float, source: str, report_table: Callable[..., None]
) -> None:
    """bf16, one rank per model replica as under FSDP; memory is not checked."""
    recipe = recipe_of(fraction=0.0, train=("llm",), batch=64)
    found = plan_recipe(recipe, devices=8, device=device).text.mfu
    report_table((f"7B text on {device}", f"predicted {found:.1%}", f"published {source}"))
    assert found is not None
    assert low <= found <= high


def test_mfu_is_the_efficiency_when_nothing_is_lost() -> None:
    """One stage, no encoders, no recompute: every FLOP is a model FLOP."""
    times = FlatTimes(flops_per_s=0.45 * DEVICES["h200"].peak_flops["bf16"])
    plan = plan_recipe(recipe_of(fraction=0.0, train=("llm",)), devices=8, times=times)
    assert plan.expected.mfu == pytest.approx(0.45)
    assert plan.expected.bubble == 0
    assert plan.layout is None
    assert plan.mfu_convention == MFU_CONVENTION


def test_tensor_parallelism_divides_the_decoder() -> None:
    source = DeviceTimes(device=DEVICES["h100"])
    one, four = (source.blocks(scenario_of(tensor=t), "multimodal") for t in (1, 4))
    assert one.layer.forward / 4 < four.layer.forward < one.layer.forward
    assert four.vision == one.vision, "every tensor-parallel rank repeats the encoders"


def test_placements_spread_the_encoders() -> None:
    source = DeviceTimes(device=DEVICES["h100"])
    sizes = {"tensor": 4, "pipeline": 4, "batch": 64}
    by_name = {name: scenario_of(vision=name, **sizes) for name in ("recompute", "split_tp", "split_all")}
    within = {name: source.blocks(scenario, "multimodal").vision.forward for name, scenario in by_name.items()}
    assert within["split_all"] < within["split_tp"] < within["recompute"]
    assert within["split_tp"] > within["recompute"] * 2 / 5, "5 images on 4 ranks: one rank has 2"
    steps = {name: step_time(by_name[name], (8, 8, 8, 6), source, "multimodal") for name in by_name}
    assert steps["split_all"].seconds < steps["split_tp"].seconds < steps["recompute"].seconds
    assert steps["split_all"].extras.before > 0 == steps["split_tp"].extras.before
    text = [step_time(by_name[name], (8, 8, 8, 6), source, "text") for name in by_name]
    assert text[0].pipeline_s == text[1].pipeline_s == text[2].pipeline_s


def test_gathering_shares_costs_what_other_ranks_encoded() -> None:
    device = DEVICES["h100"]
    scenario = scenario_of(tensor=4, vision="split_tp")
    padded = 4 * 2 * 576 * 4096 * 2
    expected = device.local.latency + padded * 3 / 4 / device.local.bandwidth
    assert gather_time(scenario, "multimodal", device).forward == pytest.approx(expected)
    for other in (scenario_of(tensor=4), scenario_of(tensor=4, vision="split_all")):
        assert gather_time(other, "multimodal", device) == Pass()
    assert gather_time(scenario, "text", device) == Pass()


def test_split_all_pays_for_features_and_trained_towers() -> None:
    device = DEVICES["h100"]
    sizes = {"pipeline": 4, "batch": 16, "vision": "split_all"}
    frozen, trained = (exchange_time(scenario_of(stage=stage, **sizes), "multimodal", device) for stage in (1, 3))
    # 16 micro-batches of 5 images, a quarter on each rank; two towers' features of 576 x 1024 in bf16.
    features = 20 * 3 * 2 * 576 * 1024 * 2 / device.local.bandwidth
    frozen_towers = exchange_time(scenario_of(train=("llm",), **sizes), "multimodal", device)
    assert frozen_towers.forward == pytest.approx(device.local.latency + features)
    assert frozen_towers.backward == 0
    assert frozen.backward > 0, "the SAM downsamples train in every stage"
    assert trained.forward > frozen.forward > frozen_towers.forward
    assert exchange_time(scenario_of(stage=3, **sizes), "text", device) == Pass()


def test_split_all_reruns_fully_trained_towers() -> None:
    """`split_all` re-runs SigLIP for its gradient in stage 3, SAM's trunk stays frozen."""

    def towers(vision: str) -> dict[str, tuple[float, float]]:
        scenario = scenario_of(stage=3, pipeline=2, vision=vision)
        blocks = all_work(scenario, "multimodal")
        return {block.name: (block.forward.flops, block.backward.flops) for block in blocks}

    within, ahead = towers("recompute"), towers("split_all")
    forward, backward = within["SigLIP"]
    assert ahead["SigLIP"] == (forward, backward + forward)
    assert ahead["SAM"] == within["SAM"]


def test_dummy_image_is_encoded_only_where_replicas_overlap() -> None:
    source = DeviceTimes(device=DEVICES["h100"])
    overlaps = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    without: tuple[dict[str, object], ...] = (overlaps, {"train": ("llm",)})
    for changes, devices, encodes in (({}, 2, True), ({}, 1, False), *((changes, 2, False) for changes in without)):
        scenario = make_scenario(recipe_of(**changes), devices=devices)  # type: ignore[arg-type]
        assert (step_time(scenario, (30,), source, "text").extras.dummy_image > 0) == encodes


def test_tensor_ranks_beyond_a_node_use_the_network() -> None:
    source = DeviceTimes(device=DEVICES["a100"])
    near, far = (
        source.blocks(make_scenario(recipe_of(tensor=tensor), devices=16), "text").layer.forward for tensor in (8, 16)
    )
    assert far > 2 * near


def test_overlap_hides_gradient_reduction() -> None:
    source = DeviceTimes(device=DEVICES["a100"])
    hidden, shown = (
        step_time(
            make_scenario(recipe_of(overlap_grad_reduce=on, overlap_param_gather=on), devices=64), (30,), source, "text"
        )
        for on in (True, False)
    )
    assert hidden.extras.reduce < shown.extras.reduce / 10
    assert hidden.extras.update < shown.extras.update


def test_without_distributed_optimizer_replicas_update_everything() -> None:
    source = DeviceTimes(device=DEVICES["a100"])
    shared, whole = (
        step_time(
            make_scenario(
                recipe_of(distributed_optimizer=on, overlap_grad_reduce=False, overlap_param_gather=False), devices=64
            ),
            (30,),
            source,
            "text",
        ).extras
        for on in (True, False)
    )
    assert whole.reduce == pytest.approx(2 * shared.reduce, rel=1e-3)
    assert whole.update > shared.update


def test_proportional_times_know_nothing_but_flops() -> None:
    scenario = scenario_of(tensor=2, pipeline=2)
    times = FlatTimes(flops_per_s=2.0).blocks(scenario, "text")
    layer = decoder_layer_blocks(scenario.recipe.model.llm, tokens=4096, seq_length=4096)
    assert times.layer.total == train_flops(layer, trainable=TEXT) / 2 / 2
    assert FlatTimes().transfer(scenario) == 0


def test_collectives() -> None:
    link = Link(bandwidth=100.0, latency=1.0)
    assert all_reduce(400.0, ranks=4, link=link) == pytest.approx(1 + 2 * 300 / 100)
    assert all_reduce(400.0, ranks=1, link=link) == 0


def test_peaks_and_sources_of_known_devices() -> None:
    assert DEVICES["a100"].peak_flops["bf16"] == 312e12
    assert DEVICES["h200"].peak_flops["bf16"] == DEVICES["h100"].peak_flops["bf16"] == 989.5e12
    assert not DEVICES["cpu"].peak_flops
    for device in DEVICES.values():
        assert len(device.sources) >= 3
        assert all(device.matrix_flops[p] <= peak for p, peak in device.peak_flops.items())
