"""The plan of a recipe on a number of devices: parameters, FLOPs and memory per rank, bubble, step time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from megavl.config.identity import model_name
from megavl.config.library_settings import library_settings
from megavl.planner.cost.flops import MFU_CONVENTION, mfu, model_flops
from megavl.planner.cost.memory import RankMemory, rank_memory, rank_parameters, rank_stages
from megavl.planner.decoding import Decoding, decoding
from megavl.planner.hardware.devices import Device
from megavl.planner.layouts.layout import layout_string
from megavl.planner.scenario import Kind, Scenario
from megavl.planner.simulation.predict import StepTime, step_time
from megavl.planner.simulation.times import FlatTimes, TimeSource


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
    """The same for a multimodal micro-batch, with the images that this rank encodes within the pipeline."""
    text_busy: float
    """Share of the schedule in which the rank computes, text-only steps."""
    multimodal_busy: float
    memory: RankMemory


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One kind of optimizer step over all devices, or the mean of both kinds."""

    flops: float
    """Model FLOPs, `megavl.planner.cost.flops.step_flops`."""
    seconds: float
    tokens_per_s: float
    mfu: float | None
    """None if no peak is known; see `MFU_CONVENTION`."""
    bubble: float
    """Share of the schedule in which ranks do not compute, simulated."""
    pipeline_s: float
    """Seconds of the schedule."""
    outside_s: dict[str, float]
    """Seconds outside the schedule by name, as in `megavl.planner.simulation.times.StepExtras`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Expectation for one recipe on `devices` devices."""

    model: str
    training_stage: int
    trained: tuple[str, ...]
    device: str
    devices: int
    device_memory: int | None
    """Bytes; None: the device sets no limit."""
    usable_memory: int | None
    """The part of it that a layout may use; see `Device.usable_bytes`."""
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
    """Source of the seconds."""
    assumptions: tuple[str, ...]
    ranks: tuple[RankPlan, ...]
    text: StepPlan
    multimodal: StepPlan
    expected: StepPlan
    """Mean over the mixture."""
    days: float
    """All steps of the recipe at the expected step time."""
    decoding: Decoding
    """Images of one data-parallel rank, and the processes that decode them."""
    bucket_size: int
    """Parameters per gradient bucket."""
    cpu_binding: str | None
    """Where a rank's process runs; None on a CPU."""
    environment: dict[str, str]
    """Settings of libraries that each rank makes unless they are set."""
    mfu_convention: str = MFU_CONVENTION

    @property
    def fits(self) -> bool | None:
        """Whether every rank's estimate is within the usable memory; None if that is unknown."""
        if self.usable_memory is None:
            return None
        return max(rank.memory.total for rank in self.ranks) <= self.usable_memory


def plan_scenario(scenario: Scenario, layout: tuple[int, ...], source: TimeSource, hardware: Device) -> Plan:
    """Plan a run."""
    recipe, peak = scenario.recipe, hardware.peak_flops.get(scenario.recipe.training.precision)
    kinds: tuple[Kind, Kind] = ("text", "multimodal")
    found = {kind: step_time(scenario, layout, source, kind) for kind in kinds}
    steps = {kind: _step_plan(scenario, found[kind], peak=peak) for kind in kinds}
    expected = _mean(scenario, steps["text"], steps["multimodal"], peak=peak)
    return Plan(
        model=model_name(recipe.model),
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
        tokens_per_step=scenario.step_tokens,
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
        decoding=decoding(scenario, layout, source),
        bucket_size=recipe.parallel.bucket(ranks=scenario.data_parallel),
        cpu_binding=recipe.parallel.cpu_binding if hardware.memory_bytes else None,
        # A device without memory of its own is the CPU.
        environment=library_settings(ranks=min(scenario.devices, hardware.per_node), cores=None)
        if hardware.memory_bytes
        else {},
    )


def to_json(plan: Plan, **more: Any) -> str:
    """The plan as one JSON object; unknown values are null."""
    raw = asdict(plan)
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
    """Hardware FLOPs of one device of a pipeline rank for one micro-batch within the schedule."""
    times = FlatTimes().blocks(scenario, kind)
    stages = rank_stages(scenario, rank)
    return sum(times.stage(stage, layers=layout[stage], stages=len(layout)).total for stage in stages)


def _busy(scenario: Scenario, rank: int, step: StepTime) -> float:
    """Share of the schedule in which the rank computes: each of its stages m times."""
    seconds = sum(step.stages[stage].total for stage in rank_stages(scenario, rank)) * scenario.micro_batches
    return seconds / step.pipeline_s if step.pipeline_s else 0.0


def _step_plan(scenario: Scenario, step: StepTime, *, peak: float | None) -> StepPlan:
    busy = sum(_busy(scenario, rank, step) for rank in range(scenario.pipeline)) / scenario.pipeline
    return _finish(
        scenario,
        peak,
        flops=model_flops(scenario, step.kind),
        seconds=step.seconds,
        bubble=max(0.0, 1 - busy),
        pipeline_s=step.pipeline_s,
        # `plan --json` calls the dummy image `anchor`.
        outside_s={key.replace("dummy_image", "anchor"): value for key, value in asdict(step.extras).items()},
    )


def _mean(scenario: Scenario, text: StepPlan, multimodal: StepPlan, *, peak: float | None) -> StepPlan:
    def mix(a: float, b: float) -> float:
        return (1 - scenario.share) * a + scenario.share * b

    return _finish(
        scenario,
        peak,
        flops=mix(text.flops, multimodal.flops),
        seconds=mix(text.seconds, multimodal.seconds),
        bubble=mix(text.bubble, multimodal.bubble),
        pipeline_s=mix(text.pipeline_s, multimodal.pipeline_s),
        outside_s={name: mix(seconds, multimodal.outside_s[name]) for name, seconds in text.outside_s.items()},
    )


def _finish(scenario: Scenario, peak: float | None, *, flops: float, seconds: float, **rest: Any) -> StepPlan:
    """Add throughput and MFU."""
    return StepPlan(
        flops=flops,
        seconds=seconds,
        tokens_per_s=scenario.step_tokens / seconds,
        mfu=mfu(flops, seconds=seconds, devices=scenario.devices, peak_flops=peak) if peak else None,
        **rest,
    )
