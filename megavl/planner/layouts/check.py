"""Refuses a layout that cannot work and names the nearest one that does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megavl.config.errors import UsageError
from megavl.config.recipe import Recipe, RecomputeConfig
from megavl.planner.cost.memory import fullest_rank
from megavl.planner.hardware.devices import Device
from megavl.planner.layouts.balance import balance
from megavl.planner.layouts.layout import layout_of
from megavl.planner.layouts.search import Choice, choices, recomputes, scenario_with
from megavl.planner.scenario import Scenario, check_images, expected_images, make_scenario, multimodal_share
from megavl.planner.simulation.times import DeviceTimes, FlatTimes, TimeSource
from megavl.planner.units import format_bytes


def checked_scenario(
    recipe: Recipe, *, devices: int | None, device: Device | None, images: float | None = None
) -> Scenario:
    """`make_scenario`, with the nearest layout that works in its error messages."""
    if images is not None:
        check_images(recipe, images)
    try:
        return make_scenario(recipe, devices=devices, images=images)
    except UsageError as error:
        if devices is None or devices < 1:
            raise
        text = nearest_text(recipe, Choice.of(recipe), devices=devices, device=device)
        raise UsageError(f"{error}{text}") from None


def checked_layout(scenario: Scenario, device: Device | None) -> tuple[int, ...]:
    """Decoder layers per stage for training, refused where they need more memory than the device has.

    The memory estimate leaves things out, so what it finds too large is too large.

    Args:
        scenario: recipe and sizes, checked.
        device: kind of device; None: unknown, so that memory is not checked.

    Raises:
        UsageError: what does not fit, and the nearest layout that does.
    """
    if device is None:
        return layout_of(scenario, FlatTimes())
    layout = layout_of(scenario, DeviceTimes(device=device), memory_bytes=device.usable_bytes)
    check_memory(scenario, layout, device)
    return layout


def check_memory(scenario: Scenario, layout: tuple[int, ...], device: Device) -> None:
    """Refuse a layout if a rank exceeds the device's memory.

    Raises:
        UsageError: the rank, its sizes, and the nearest layout that fits.
    """
    if device.memory_bytes is None:
        return
    rank, worst = fullest_rank(scenario, layout)
    if worst.total <= device.memory_bytes:
        return
    recipe = scenario.recipe
    raise UsageError(
        f"parallel: pipeline rank {rank} needs {format_bytes(worst.total)} (weights {format_bytes(worst.weights)}, "
        f"gradients {format_bytes(worst.gradients)}, optimizer {format_bytes(worst.optimizer)}, activations "
        f"{format_bytes(worst.activations)}), one {device.name} has {format_bytes(device.memory_bytes)}"
        f"{nearest_text(recipe, Choice.of(recipe), devices=scenario.devices, device=device)}"
    )


def wanted_choice(raw: Mapping[str, Any]) -> Choice:
    """What a recipe that failed its checks asks for; a size that is no positive number counts as 1."""

    def value(section: str, name: str) -> Any:
        found = raw.get(section)
        return found.get(name) if isinstance(found, Mapping) else None

    def size(section: str, name: str) -> int:
        found = value(section, name)
        return found if isinstance(found, int) and found > 0 else 1

    return Choice(
        tensor=size("parallel", "tensor"),
        pipeline=size("parallel", "pipeline"),
        virtual=size("parallel", "virtual_pipeline"),
        micro_batch_size=size("training", "micro_batch_size"),
        recompute=RecomputeConfig(),
        vision=value("parallel", "vision") or "recompute",
    )


def distance(wanted: Choice, choice: Choice) -> float:
    """How far `choice` is: doublings of its sizes, then placement, then more recompute."""
    names = ("tensor", "pipeline", "virtual", "micro_batch_size")
    doublings = sum(abs(math.log2(getattr(wanted, name) / getattr(choice, name))) for name in names)
    order = ("none", "selective", "full").index(choice.recompute.granularity)
    return doublings + 0.5 * (wanted.vision != choice.vision) + 0.1 * order


def nearest_text(recipe: Recipe, wanted: Choice, *, devices: int, device: Device | None) -> str:
    """The nearest layout that works, to append to an error message."""
    found = nearest(recipe, wanted, devices=devices, device=device)
    if found is None:
        return f"; no layout of this recipe works on {devices} devices"
    choice, layout = found
    changes = {
        "parallel.tensor": choice.tensor,
        "parallel.pipeline": choice.pipeline,
        "parallel.virtual_pipeline": choice.virtual,
        "parallel.sequence_parallel": str(choice.tensor > 1).lower(),
        "parallel.layout": str(list(layout)).replace(" ", ""),
    }
    if choice.vision != wanted.vision:
        changes["parallel.vision"] = choice.vision
    if choice.micro_batch_size != wanted.micro_batch_size:
        changes["training.micro_batch_size"] = choice.micro_batch_size
    if choice.recompute.granularity != recipe.recompute.granularity:
        changes["recompute.granularity"] = choice.recompute.granularity
        if choice.recompute.granularity == "selective":
            changes["recompute.modules"] = f"[{','.join(choice.recompute.modules)}]"
    text = " ".join(f"{key}={value}" for key, value in changes.items())
    return f"; nearest that works on {devices} devices: {text}"


def nearest(
    recipe: Recipe, wanted: Choice, *, devices: int, device: Device | None
) -> tuple[Choice, tuple[int, ...]] | None:
    """The choice closest to the wanted one, with its layers; None if nothing works.

    Args:
        recipe: the stage with any valid layout, which is ignored.
        wanted: what the user asked for; its recompute is ignored.
        device: kind of device; None: no memory limit, times proportional to FLOPs.
    """
    base = Scenario(
        recipe=recipe, devices=devices, images=float(expected_images(recipe)), share=multimodal_share(recipe)
    )
    per_node = device.per_node if device else 8
    source: TimeSource = DeviceTimes(device=device) if device else FlatTimes()
    limit = device.usable_bytes if device else None
    leaner = set(recomputes(recipe)[recomputes(recipe).index(recipe.recompute) :])
    possible = [choice for choice in choices(base, per_node=per_node) if choice.recompute in leaner]
    for choice in sorted(possible, key=lambda choice: (distance(wanted, choice), choice.recompute != recipe.recompute)):
        scenario = scenario_with(base, choice)
        layout = balance(scenario, source, memory_bytes=limit, simulated=False)
        if limit is None or fullest_rank(scenario, layout)[1].total <= limit:
            return choice, layout
    return None
