"""Modality-grouped steps against randomly mixed ones, at any scale.

Grouped: all sequences of a step are text, or all are multimodal. Mixed: each sequence of each replica is multimodal
with the mixture's probability. Then micro-batches and replicas differ, and the step waits for the slowest.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megavl.planner.scenario import Kind, Scenario
from megavl.planner.simulation.predict import expected_extras, expected_seconds, stage_passes
from megavl.planner.simulation.simulate import simulate
from megavl.planner.simulation.times import Pass, TimeSource


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mean step times."""

    grouped_s: float
    mixed_s: float
    """Replicas wait for each other at the end of a step."""
    lockstep_s: float
    """Mixed too, but replicas wait after every micro-batch, as they do if each gathers sharded weights."""
    replicas: int
    steps: int
    """Mixed steps that were simulated."""
    seed: int

    @property
    def gain(self) -> float:
        """How much faster grouped steps are: 0.2 is 20% more throughput."""
        return self.mixed_s / self.grouped_s - 1

    @property
    def lockstep_gain(self) -> float:
        """The same against `lockstep_s`."""
        return self.lockstep_s / self.grouped_s - 1


def compare_mixing(
    scenario: Scenario, layout: Sequence[int], source: TimeSource, *, steps: int, seed: int = 0
) -> Mixing:
    """Simulate `steps` mixed steps of all replicas, and the grouped ones.

    Args:
        scenario: recipe and sizes; the share of multimodal sequences is its `share`.
    """
    draw = random.Random(seed)
    costs = _costs(scenario, layout, source)
    size = scenario.recipe.training.micro_batch_size
    transfer_s, slowdown = source.transfer(scenario), source.slowdown(scenario)

    def seconds(kinds: Sequence[int]) -> float:
        return simulate(
            pipeline=scenario.pipeline,
            virtual=scenario.virtual,
            costs=costs,
            kinds=kinds,
            transfer_s=transfer_s,
            slowdown=slowdown,
        ).seconds

    mixed = lockstep = 0.0
    for _ in range(steps):
        replicas = [
            [sum(draw.random() < scenario.share for _ in range(size)) for _ in range(scenario.micro_batches)]
            for _ in range(scenario.data_parallel)
        ]
        mixed += max(seconds(kinds) for kinds in replicas)
        lockstep += seconds([max(kinds) for kinds in zip(*replicas, strict=True)])
    extras = expected_extras(scenario, layout, source)
    return Mixing(
        grouped_s=expected_seconds(scenario, layout, source),
        mixed_s=mixed / steps + extras,
        lockstep_s=lockstep / steps + extras,
        replicas=scenario.data_parallel,
        steps=steps,
        seed=seed,
    )


def _costs(scenario: Scenario, layout: Sequence[int], source: TimeSource) -> list[tuple[Pass, ...]]:
    """Passes of a micro-batch by its number of multimodal sequences."""
    size, out = scenario.recipe.training.micro_batch_size, []
    for count in range(size + 1):
        kind: Kind = "multimodal" if count else "text"
        part = dataclasses.replace(scenario, images=scenario.images * count / size)
        out.append(stage_passes(source.blocks(part, kind), layout))
    return out
