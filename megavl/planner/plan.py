"""What a recipe will take on a number of devices: parameters, FLOPs and memory per stage, bubble, step time.

Step time = (sum of the stages' micro-batch times + (m - 1) x the slowest one) / efficiency, for m micro-batches under
1F1B; with equal stages that is the published bubble (p - 1) / (m + p - 1). `efficiency` is the share of the peak that a
busy device reaches, communication and optimizer included; it is assumed, not measured.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from megavl.config.errors import UsageError
from megavl.config.recipe import Recipe
from megavl.planner.cost import mfu, step_flops
from megavl.planner.devices import find_device
from megavl.planner.layout import StageCosts, expected_images, layout_string, resolve_layout, stage_costs
from megavl.planner.memory import StageMemory, stage_memory, stage_parameters

DEFAULT_EFFICIENCY = 0.5
"""Best published share of the bf16 peak for a 7B model at 4,096 tokens on H100 is 40% to 50%."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One rank of one pipeline stage."""

    stage: int
    layers: int
    """Decoder layers."""
    parameters: int
    trained_parameters: int
    text_flops: float
    """Forward, backward and recompute FLOPs of one text-only micro-batch."""
    multimodal_flops: float
    """The same of a multimodal micro-batch; the encoders are repeated on every tensor-parallel rank."""
    memory: StageMemory


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One kind of optimizer step over all devices, or the mean of both kinds."""

    flops: float
    """Useful FLOPs, `megavl.planner.cost.step_flops`."""
    seconds: float | None
    """Step time; None where no peak is known."""
    tokens_per_s: float | None
    mfu: float | None


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
    tensor: int
    pipeline: int
    data_parallel: int
    micro_batches: int
    """Per step and data-parallel rank."""
    tokens_per_step: int
    images_per_sequence: int
    """Assumed in every sequence of a multimodal step."""
    multimodal_fraction: float
    efficiency: float
    """Assumed share of the peak that a busy device reaches."""
    layout: str | None
    """megatron-core's layout string."""
    stages: tuple[StagePlan, ...]
    bubble: float
    """(p - 1) / (m + p - 1), the idle share with equal stages."""
    text: StepPlan
    multimodal: StepPlan
    expected: StepPlan
    """Mean over steps at data.multimodal_fraction."""

    @property
    def fits(self) -> bool | None:
        """Whether every stage's estimate is within the device's memory; None where that is unknown."""
        if self.device_memory is None:
            return None
        return max(stage.memory.total for stage in self.stages) <= self.device_memory


def plan_recipe(recipe: Recipe, *, devices: int, device: str = "h200", efficiency: float = DEFAULT_EFFICIENCY) -> Plan:
    """Plan `recipe` on `devices` devices of one kind.

    Args:
        recipe: one training stage.
        devices: world size.
        device: row of `megavl.planner.devices.DEVICES`.
        efficiency: assumed share of the peak that a busy device reaches, above 0 to 1.

    Raises:
        UsageError: when the devices do not fit the recipe's parallel sizes and batch, or an argument is out of range.
    """
    if not 0 < efficiency <= 1:
        raise UsageError(f"--efficiency: {efficiency} is no share of the peak; give a number above 0, at most 1")
    if devices < 1:
        raise UsageError(f"--devices: {devices} is no number of devices; give 1 or more")
    hardware = find_device(device)
    parallel, training = recipe.parallel, recipe.training
    data_parallel = recipe.data_parallel(devices)
    micro_batches = training.global_batch_size // (data_parallel * training.micro_batch_size)
    images, layout = expected_images(recipe), resolve_layout(recipe)
    costs = {kind: stage_costs(recipe, images_per_sequence=count) for kind, count in _kinds(images).items()}
    peak = hardware.peak_flops.get(training.precision)

    def step(kind: str) -> StepPlan:
        seconds = None
        if peak is not None:
            seconds = pipeline_flops(costs[kind], layout=layout, micro_batches=micro_batches) / (peak * efficiency)
        return _step_plan(recipe, images=_kinds(images)[kind], seconds=seconds, devices=devices, peak=peak)

    text, multimodal = step("text"), step("multimodal")
    stages = tuple(
        _stage_plan(recipe, stage, layers, costs, data_parallel=data_parallel, micro_batches=micro_batches)
        for stage, layers in enumerate(layout)
    )
    return Plan(
        model=recipe.model.preset,
        training_stage=training.stage,
        trained=recipe.trainable_parts,
        device=hardware.name,
        devices=devices,
        device_memory=hardware.memory_bytes,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data_parallel=data_parallel,
        micro_batches=micro_batches,
        tokens_per_step=training.global_batch_size * recipe.data.seq_length,
        images_per_sequence=images,
        multimodal_fraction=recipe.data.multimodal_fraction,
        efficiency=efficiency,
        layout=layout_string(layout),
        stages=stages,
        bubble=(parallel.pipeline - 1) / (micro_batches + parallel.pipeline - 1),
        text=text,
        multimodal=multimodal,
        expected=_mean_step(recipe, text=text, multimodal=multimodal, devices=devices, peak=peak),
    )


def pipeline_flops(costs: StageCosts, *, layout: tuple[int, ...], micro_batches: int) -> float:
    """FLOPs on the critical path of a 1F1B step: every stage once, the slowest for the other micro-batches."""
    stages = [costs.of(stage, layers=layers, stages=len(layout)) for stage, layers in enumerate(layout)]
    return sum(stages) + (micro_batches - 1) * max(stages)


def to_json(plan: Plan) -> str:
    """The plan as one JSON object; unknown values are null."""
    raw = dataclasses.asdict(plan)
    for entry, stage in zip(raw["stages"], plan.stages, strict=True):
        entry["memory"]["total"] = stage.memory.total
    return json.dumps({**raw, "fits": plan.fits}, indent=2)


def render(plan: Plan) -> str:
    """The plan as aligned text, one row per pipeline stage and per kind of step."""
    stages: list[tuple[str, ...]] = [_STAGE_HEADER, *(_stage_row(stage) for stage in plan.stages)]
    steps: list[tuple[str, ...]] = [_STEP_HEADER]
    if plan.multimodal_fraction < 1:
        steps.append(_step_row("text-only", plan.text, devices=plan.devices))
    if plan.multimodal_fraction > 0:
        name = f"multimodal, {plan.images_per_sequence} images a sequence"
        steps.append(_step_row(name, plan.multimodal, devices=plan.devices))
    steps.append(_step_row(f"mean, {plan.multimodal_fraction:.0%} multimodal", plan.expected, devices=plan.devices))
    lines = [
        f"model {plan.model}, training stage {plan.training_stage}: trains {', '.join(plan.trained) or 'nothing'}",
        f"{plan.devices} x {plan.device}: tensor {plan.tensor} x pipeline {plan.pipeline} x data {plan.data_parallel}, "
        f"{plan.micro_batches} micro-batches a step, layout {plan.layout or 'one stage'}",
        "",
        "per rank; FLOPs of one micro-batch with backward and recompute; memory",
        *_align(stages),
        _memory_line(plan),
        "",
        f"pipeline bubble {plan.bubble:.1%} with equal stages; {_efficiency_note(plan)}",
        *_align(steps),
    ]
    return "\n".join(lines)


_STAGE_HEADER = (
    *("stage", "layers", "parameters", "trained", "FLOPs text", "FLOPs multimodal"),
    *("weights", "gradients", "optimizer", "activations", "total"),
)
_STEP_HEADER = ("step", "FLOPs", "seconds", "tokens/s", "tokens/s/device", "MFU")


def _scaled(value: float, *, base: int, units: Sequence[str]) -> str:
    """`value` with the largest unit that keeps it at 1 or above."""
    power = 0
    while value >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.2f} {units[power]}".rstrip()


def _flops(value: float) -> str:
    return _scaled(value, base=1000, units=("", "K", "M", "G", "T", "P", "E"))


def _bytes(value: float) -> str:
    return _scaled(value, base=1024, units=("B", "KiB", "MiB", "GiB", "TiB"))


def _stage_row(stage: StagePlan) -> tuple[str, ...]:
    memory = stage.memory
    sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
    return (
        str(stage.stage),
        str(stage.layers),
        f"{stage.parameters:,}",
        f"{stage.trained_parameters:,}",
        _flops(stage.text_flops),
        _flops(stage.multimodal_flops),
        *(_bytes(size) for size in sizes),
    )


def _step_row(name: str, step: StepPlan, *, devices: int) -> tuple[str, ...]:
    flops = _flops(step.flops)
    if step.seconds is None or step.tokens_per_s is None or step.mfu is None:
        return (name, flops, "-", "-", "-", "-")
    rate, rate_per_device = f"{step.tokens_per_s:,.0f}", f"{step.tokens_per_s / devices:,.0f}"
    return (name, flops, f"{step.seconds:.4g}", rate, rate_per_device, f"{step.mfu:.1%}")


def _memory_line(plan: Plan) -> str:
    if plan.device_memory is None:
        return "memory is an estimate; this device sets no limit"
    word = "within" if plan.fits else "ABOVE"
    return f"memory is an estimate, {word} the {_bytes(plan.device_memory)} of one {plan.device}"


def _efficiency_note(plan: Plan) -> str:
    if plan.expected.seconds is None:
        return f"no step time: the peak of {plan.device} at this precision is not known"
    return f"step times assume that a busy device reaches {plan.efficiency:.0%} of its peak (--efficiency)"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    """First column left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _kinds(images: int) -> dict[str, int]:
    """Images per sequence of each kind of step."""
    return {"text": 0, "multimodal": images}


def _stage_plan(
    recipe: Recipe,
    stage: int,
    layers: int,
    costs: dict[str, StageCosts],
    *,
    data_parallel: int,
    micro_batches: int,
) -> StagePlan:
    parameters, trained = stage_parameters(recipe, stage=stage, layers=layers)
    stages = recipe.parallel.pipeline
    return StagePlan(
        stage=stage,
        layers=layers,
        parameters=parameters,
        trained_parameters=trained,
        text_flops=costs["text"].of(stage, layers=layers, stages=stages),
        multimodal_flops=costs["multimodal"].of(stage, layers=layers, stages=stages),
        memory=stage_memory(
            recipe,
            stage=stage,
            layers=layers,
            data_parallel=data_parallel,
            micro_batches=micro_batches,
            images_per_sequence=expected_images(recipe),
        ),
    )


def _step_plan(recipe: Recipe, *, images: int, seconds: float | None, devices: int, peak: float | None) -> StepPlan:
    sequences, length = recipe.training.global_batch_size, recipe.data.seq_length
    flops = step_flops(
        recipe.model,
        seq_length=length,
        sequences=sequences,
        images=images * sequences,
        trainable_parts=recipe.trainable_parts,
    )
    return _finish(flops, seconds=seconds, tokens=sequences * length, devices=devices, peak=peak)


def _mean_step(recipe: Recipe, *, text: StepPlan, multimodal: StepPlan, devices: int, peak: float | None) -> StepPlan:
    share = recipe.data.multimodal_fraction
    seconds = None
    if text.seconds is not None and multimodal.seconds is not None:
        seconds = share * multimodal.seconds + (1 - share) * text.seconds
    tokens = recipe.training.global_batch_size * recipe.data.seq_length
    flops = share * multimodal.flops + (1 - share) * text.flops
    return _finish(flops, seconds=seconds, tokens=tokens, devices=devices, peak=peak)


def _finish(flops: float, *, seconds: float | None, tokens: int, devices: int, peak: float | None) -> StepPlan:
    if seconds is None or peak is None:
        return StepPlan(flops=flops, seconds=None, tokens_per_s=None, mfu=None)
    return StepPlan(
        flops=flops,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        mfu=mfu(flops, seconds=seconds, devices=devices, peak_flops=peak),
    )
