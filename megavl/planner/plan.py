"""What a recipe will take on a number of devices: parameters, FLOPs and memory per rank, bubble, step time."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from megavl.config.recipe import Recipe
from megavl.planner.cost.flops import MFU_CONVENTION, mfu
from megavl.planner.cost.memory import RankMemory, rank_memory, rank_parameters, rank_stages
from megavl.planner.cost.work import BlockWork, all_work
from megavl.planner.hardware.devices import Device, find_device
from megavl.planner.layouts.layout import layout_of, layout_string
from megavl.planner.layouts.search import useful_flops
from megavl.planner.scenario import Kind, Scenario, make_scenario
from megavl.planner.simulation.predict import StepTime, step_time
from megavl.planner.simulation.times import DeviceTimes, FlatTimes, TimeSource, flat_times


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One device of one pipeline rank."""

    rank: int
    layers: tuple[int, ...]
    """Decoder layers of each of its stages."""
    parameters: int
    trained_parameters: int
    text_flops: float
    """Forward, backward and recompute FLOPs of one text-only micro-batch."""
    multimodal_flops: float
    """The same of a multimodal micro-batch, with what this rank encodes within the pipeline."""
    text_busy: float
    """Share of the schedule in which the rank computes, text-only steps."""
    multimodal_busy: float
    memory: RankMemory


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One kind of optimizer step over all devices, or the mean of both kinds."""

    flops: float
    """Useful FLOPs, `megavl.planner.cost.flops.step_flops`."""
    seconds: float
    tokens_per_s: float
    mfu: float | None
    """None where no peak is known; see `MFU_CONVENTION`."""
    bubble: float
    """Share of the schedule in which ranks do not compute, simulated."""
    pipeline_s: float
    """Seconds of the schedule."""
    outside_s: dict[str, float]
    """Seconds outside the schedule, by name: `megavl.planner.simulation.times.StepExtras`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Expectation for one recipe on `devices` devices."""

    model: str
    training_stage: int
    trained: tuple[str, ...]
    device: str
    devices: int
    device_memory: int | None
    """Bytes; None: not bounded by the device."""
    usable_memory: int | None
    """Of these, what a layout may plan with: the estimate leaves out the runtime, buffers and fragmentation."""
    tensor: int
    pipeline: int
    virtual_pipeline: int
    data_parallel: int
    vision: str
    """Where the encoders run."""
    micro_batches: int
    """Per step and data-parallel rank."""
    tokens_per_step: int
    images_per_sequence: float
    """Assumed in every sequence of a multimodal step."""
    multimodal_share: float
    """Mean share of multimodal steps over the run, the warm-up included."""
    layout: str | None
    """megatron-core's layout string."""
    times: str
    """Where seconds come from."""
    assumptions: tuple[str, ...]
    ranks: tuple[RankPlan, ...]
    text: StepPlan
    multimodal: StepPlan
    expected: StepPlan
    """Mean over the mixture."""
    days: float
    """All steps of the recipe at the expected step time."""
    mfu_convention: str = MFU_CONVENTION

    @property
    def fits(self) -> bool | None:
        """Whether every rank's estimate is within the usable memory; None where that is unknown."""
        if self.usable_memory is None:
            return None
        return max(rank.memory.total for rank in self.ranks) <= self.usable_memory


def choose_times(recipe: Recipe, device: Device, *, efficiency: float | None) -> TimeSource:
    """Seconds from a flat share of the peak where one is given, else from the device's table."""
    if efficiency is not None:
        return flat_times(device, precision=recipe.training.precision, efficiency=efficiency)
    return DeviceTimes(device=device)


def plan_recipe(
    recipe: Recipe,
    *,
    devices: int,
    device: str = "h200",
    efficiency: float | None = None,
    images: float | None = None,
    source: TimeSource | None = None,
) -> Plan:
    """Plan `recipe` on `devices` devices of one kind.

    Args:
        recipe: one training stage.
        devices: world size.
        device: row of `megavl.planner.hardware.devices.DEVICES`.
        efficiency: share of the peak that a busy device reaches, above 0 to 1; default: the device's table.
        images: images of a multimodal sequence; default: what packing allows.
        source: where seconds come from, instead of table or share.

    Raises:
        UsageError: the devices do not fit the recipe's parallel sizes and batch, or an argument is out of range.
    """
    hardware = find_device(device)
    scenario = make_scenario(recipe, devices=devices, images=images)
    times = choose_times(recipe, hardware, efficiency=efficiency) if source is None else source
    layout = layout_of(scenario, times, memory_bytes=hardware.usable_bytes)
    return plan_scenario(scenario, layout, times, hardware)


def plan_scenario(scenario: Scenario, layout: tuple[int, ...], source: TimeSource, hardware: Device) -> Plan:
    """Plan a scenario with a given layout; arguments as in `plan_recipe`."""
    recipe, peak = scenario.recipe, hardware.peak_flops.get(scenario.recipe.training.precision)
    kinds: tuple[Kind, Kind] = ("text", "multimodal")
    found = {kind: step_time(scenario, layout, source, kind) for kind in kinds}
    steps = {kind: _step_plan(scenario, source, found[kind], peak=peak) for kind in kinds}
    expected = _mean(scenario, steps["text"], steps["multimodal"], peak=peak)
    return Plan(
        model=recipe.model.preset,
        training_stage=recipe.training.stage,
        trained=recipe.trainable_parts,
        device=hardware.name,
        devices=scenario.devices,
        device_memory=hardware.memory_bytes,
        usable_memory=hardware.usable_bytes,
        tensor=scenario.tensor,
        pipeline=scenario.pipeline,
        virtual_pipeline=scenario.virtual,
        data_parallel=scenario.data_parallel,
        vision=scenario.vision,
        micro_batches=scenario.micro_batches,
        tokens_per_step=recipe.training.global_batch_size * recipe.data.seq_length,
        images_per_sequence=scenario.images,
        multimodal_share=scenario.share,
        layout=layout_string(layout),
        times=source.name,
        assumptions=source.assumptions,
        ranks=tuple(_rank_plan(scenario, rank, layout, found) for rank in range(scenario.pipeline)),
        text=steps["text"],
        multimodal=steps["multimodal"],
        expected=expected,
        days=recipe.training.steps * expected.seconds / 86_400,
    )


def block_table(scenario: Scenario) -> dict[str, tuple[BlockWork, ...]]:
    """Work of every block by kind of step; vision blocks of one image, the others of one micro-batch on one rank."""
    return {kind: all_work(scenario, kind) for kind in ("text", "multimodal")}


def to_json(plan: Plan, **more: Any) -> str:
    """The plan as one JSON object; unknown values are null."""
    raw = dataclasses.asdict(plan)
    for entry, rank in zip(raw["ranks"], plan.ranks, strict=True):
        entry["memory"]["total"] = rank.memory.total
    return json.dumps({**raw, "fits": plan.fits, **more}, indent=2)


def _rank_plan(scenario: Scenario, rank: int, layout: tuple[int, ...], found: dict[Kind, StepTime]) -> RankPlan:
    parameters, trained = rank_parameters(scenario, rank, layout)
    flops = {kind: _rank_flops(scenario, rank, layout, kind) for kind in found}
    busy = {kind: _busy(scenario, rank, step) for kind, step in found.items()}
    return RankPlan(
        rank=rank,
        layers=tuple(layout[stage] for stage in rank_stages(scenario, rank)),
        parameters=parameters,
        trained_parameters=trained,
        text_flops=flops["text"],
        multimodal_flops=flops["multimodal"],
        text_busy=busy["text"],
        multimodal_busy=busy["multimodal"],
        memory=rank_memory(scenario, rank, layout),
    )


def _rank_flops(scenario: Scenario, rank: int, layout: tuple[int, ...], kind: Kind) -> float:
    """FLOPs that one device of a pipeline rank spends on one micro-batch within the schedule."""
    times = FlatTimes().blocks(scenario, kind)
    stages = rank_stages(scenario, rank)
    return sum(times.stage(stage, layers=layout[stage], stages=len(layout)).total for stage in stages)


def _busy(scenario: Scenario, rank: int, step: StepTime) -> float:
    """Share of the schedule; every rank computes each of its stages m times, whatever the order."""
    seconds = sum(step.stages[stage].total for stage in rank_stages(scenario, rank)) * scenario.micro_batches
    return seconds / step.pipeline_s if step.pipeline_s else 0.0


def _step_plan(scenario: Scenario, source: TimeSource, step: StepTime, *, peak: float | None) -> StepPlan:
    recipe, flops = scenario.recipe, useful_flops(scenario, step.kind)
    busy = sum(_busy(scenario, rank, step) for rank in range(scenario.pipeline)) / scenario.pipeline
    return _finish(
        flops,
        seconds=step.seconds,
        tokens=recipe.training.global_batch_size * recipe.data.seq_length,
        devices=scenario.devices,
        peak=peak,
        bubble=max(0.0, 1 - busy),
        pipeline_s=step.pipeline_s,
        outside=dataclasses.asdict(step.extras),
    )


def _mean(scenario: Scenario, text: StepPlan, multimodal: StepPlan, *, peak: float | None) -> StepPlan:
    share = scenario.share

    def mix(a: float, b: float) -> float:
        return (1 - share) * a + share * b

    return _finish(
        mix(text.flops, multimodal.flops),
        seconds=mix(text.seconds, multimodal.seconds),
        tokens=scenario.recipe.training.global_batch_size * scenario.recipe.data.seq_length,
        devices=scenario.devices,
        peak=peak,
        bubble=mix(text.bubble, multimodal.bubble),
        pipeline_s=mix(text.pipeline_s, multimodal.pipeline_s),
        outside={name: mix(seconds, multimodal.outside_s[name]) for name, seconds in text.outside_s.items()},
    )


def _finish(
    flops: float,
    *,
    seconds: float,
    tokens: int,
    devices: int,
    peak: float | None,
    bubble: float,
    pipeline_s: float,
    outside: dict[str, float],
) -> StepPlan:
    return StepPlan(
        flops=flops,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        mfu=mfu(flops, seconds=seconds, devices=devices, peak_flops=peak) if peak else None,
        bubble=bubble,
        pipeline_s=pipeline_s,
        outside_s=outside,
    )
