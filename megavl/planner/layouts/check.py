"""Refuses a layout that cannot work, and names the nearest one that would."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megavl.config.errors import UsageError
from megavl.config.recipe import Recipe
from megavl.planner.cost.memory import rank_memory
from megavl.planner.hardware.devices import Device
from megavl.planner.layouts.balance import balance
from megavl.planner.layouts.layout import layout_of
from megavl.planner.layouts.search import Choice, choices, recomputes, scenario_with
from megavl.planner.report.text import format_bytes
from megavl.planner.scenario import Scenario, check_images, expected_images, make_scenario, multimodal_share
from megavl.planner.simulation.times import DeviceTimes, FlatTimes, TimeSource


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The cut that somebody wants, possible or not."""

    tensor: int
    pipeline: int
    virtual: int
    micro_batch_size: int
    vision: str

    @classmethod
    def of(cls, recipe: Recipe) -> Asked:
        """What a recipe asks for."""
        parallel = recipe.parallel
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual_pipeline,
            micro_batch_size=recipe.training.micro_batch_size,
            vision=parallel.vision,
        )

    @classmethod
    def of_mapping(cls, raw: Mapping[str, Any]) -> Asked:
        """What an unchecked recipe asks for; what is no positive number counts as 1."""

        def value(section: str, name: str) -> Any:
            found = raw.get(section)
            return found.get(name) if isinstance(found, Mapping) else None

        def size(section: str, name: str) -> int:
            found = value(section, name)
            return found if isinstance(found, int) and found > 0 else 1

        return cls(
            tensor=size("parallel", "tensor"),
            pipeline=size("parallel", "pipeline"),
            virtual=size("parallel", "virtual_pipeline"),
            micro_batch_size=size("training", "micro_batch_size"),
            vision=str(value("parallel", "vision") or "recompute"),
        )

    def distance(self, choice: Choice) -> float:
        """How far a cut is from this one: doublings of its sizes, then placement, then recompute."""
        sizes = (
            (self.tensor, choice.tensor),
            (self.pipeline, choice.pipeline),
            (self.virtual, choice.virtual),
            (self.micro_batch_size, choice.micro_batch_size),
        )
        doublings = sum(abs(math.log2(a / b)) for a, b in sizes)
        order = ("none", "selective", "full").index(choice.recompute.granularity)
        return doublings + 0.5 * (self.vision != choice.vision) + 0.1 * order


def check_layout(recipe: Recipe, *, devices: int, device: Device | None) -> None:
    """Refuse a recipe that cannot run on `devices` devices: sizes that do not fit, or more memory than there is.

    The memory estimate leaves things out, so what it finds too large is too large.

    Args:
        recipe: one training stage.
        devices: world size.
        device: kind of device; None: unknown, so that memory is not checked.

    Raises:
        UsageError: what does not work, and the nearest layout that would.
    """
    scenario = checked_scenario(recipe, devices=devices, device=device)
    if device is None or device.memory_bytes is None:
        return
    layout = layout_of(scenario, DeviceTimes(device=device), memory_bytes=device.usable_bytes)
    check_memory(scenario, layout, device)


def checked_scenario(
    recipe: Recipe, *, devices: int | None, device: Device | None, images: float | None = None
) -> Scenario:
    """`make_scenario`, whose errors of layout then name the nearest one that works."""
    if images is not None:
        check_images(recipe, images)
    try:
        return make_scenario(recipe, devices=devices, images=images)
    except UsageError as error:
        if devices is None or devices < 1:
            raise
        text = nearest_text(recipe, Asked.of(recipe), devices=devices, device=device)
        raise UsageError(f"{error}{text}") from None


def check_memory(scenario: Scenario, layout: tuple[int, ...], device: Device) -> None:
    """Refuse a layout of which some rank does not fit.

    Raises:
        UsageError: the rank, its sizes, and the nearest layout that fits.
    """
    problem = _memory_problem(scenario, layout, device)
    if problem is not None:
        recipe = scenario.recipe
        text = nearest_text(recipe, Asked.of(recipe), devices=scenario.devices, device=device)
        raise UsageError(f"{problem}{text}")


def _memory_problem(scenario: Scenario, layout: tuple[int, ...], device: Device) -> str | None:
    """What does not fit, in words; None where every rank fits."""
    if device.memory_bytes is None:
        return None
    totals = [rank_memory(scenario, rank, layout) for rank in range(scenario.pipeline)]
    rank = max(range(len(totals)), key=lambda index: totals[index].total)
    worst = totals[rank]
    if worst.total <= device.memory_bytes:
        return None
    return (
        f"parallel: pipeline rank {rank} needs {format_bytes(worst.total)} (weights {format_bytes(worst.weights)}, "
        f"gradients {format_bytes(worst.gradients)}, optimizer {format_bytes(worst.optimizer)}, activations "
        f"{format_bytes(worst.activations)}), one {device.name} has {format_bytes(device.memory_bytes)}"
    )


def nearest_text(recipe: Recipe, asked: Asked, *, devices: int, device: Device | None) -> str:
    """The nearest layout that works, to be put behind an error message."""
    found = nearest(recipe, asked, devices=devices, device=device)
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
    if choice.vision != asked.vision:
        changes["parallel.vision"] = choice.vision
    if choice.micro_batch_size != asked.micro_batch_size:
        changes["training.micro_batch_size"] = choice.micro_batch_size
    if choice.recompute.granularity != recipe.recompute.granularity:
        changes["recompute.granularity"] = choice.recompute.granularity
        if choice.recompute.granularity == "selective":
            changes["recompute.modules"] = f"[{','.join(choice.recompute.modules)}]"
    text = " ".join(f"{key}={value}" for key, value in changes.items())
    return f"; nearest that works on {devices} devices: {text}"


def nearest(
    recipe: Recipe, asked: Asked, *, devices: int, device: Device | None
) -> tuple[Choice, tuple[int, ...]] | None:
    """The cut closest to the one that was asked for, with its layers; None where nothing works.

    Args:
        recipe: any valid cut of the stage; its own sizes do not count.
        asked: what was wanted.
        devices: world size.
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
    for choice in sorted(possible, key=lambda choice: (asked.distance(choice), choice.recompute != recipe.recompute)):
        scenario = scenario_with(base, choice)
        layout = balance(scenario, source, memory_bytes=limit, simulated=False)
        fullest = max(rank_memory(scenario, rank, layout).total for rank in range(scenario.pipeline))
        if limit is None or fullest <= limit:
            return choice, layout
    return None
