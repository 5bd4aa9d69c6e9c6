"""Seconds of a step: the simulated pipeline and the work outside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megavl.planner.cost.memory import rank_parameters, rank_stages
from megavl.planner.scenario import KINDS, Kind, Scenario
from megavl.planner.simulation.simulate import pipeline_seconds
from megavl.planner.simulation.times import BlockTimes, Pass, StepExtras, TimeSource


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One kind of step."""

    kind: Kind
    stages: tuple[Pass, ...]
    """One micro-batch's passes on every stage."""
    pipeline_s: float
    """From the first forward pass to the last backward pass."""
    extras: StepExtras

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.pipeline_s + self.extras.total


def stage_passes(times: BlockTimes, layout: Sequence[int]) -> tuple[Pass, ...]:
    """One micro-batch's passes on every stage."""
    return tuple(times.stage(stage, layers=layers, stages=len(layout)) for stage, layers in enumerate(layout))


def kinds_of(scenario: Scenario) -> tuple[Kind, ...]:
    """Kinds of step that occur in the run."""
    return tuple(kind for kind in KINDS if scenario.weight(kind) > 0)


def step_time(scenario: Scenario, layout: Sequence[int], source: TimeSource, kind: Kind) -> StepTime:
    """Simulate one kind of step."""
    stages = stage_passes(source.blocks(scenario, kind), layout)
    seconds = pipeline_seconds(
        pipeline=scenario.pipeline,
        virtual=scenario.virtual,
        costs=stages,
        micro_batches=scenario.micro_batches,
        transfer_s=source.transfer(scenario),
        slowdown=source.slowdown(scenario),
    )
    return StepTime(
        kind=kind, stages=stages, pipeline_s=seconds, extras=slowest_extras(scenario, layout, source, kind, stages)
    )


def expected_seconds(scenario: Scenario, layout: Sequence[int], source: TimeSource) -> float:
    """Mean step time over the mixture of the run."""
    return sum(scenario.weight(kind) * step_time(scenario, layout, source, kind).seconds for kind in kinds_of(scenario))


def expected_extras(scenario: Scenario, layout: Sequence[int], source: TimeSource) -> float:
    """Mean seconds outside the schedule, over the mixture of the run."""
    out = 0.0
    for kind in kinds_of(scenario):
        stages = stage_passes(source.blocks(scenario, kind), layout)
        out += scenario.weight(kind) * slowest_extras(scenario, layout, source, kind, stages).total
    return out


def slowest_extras(
    scenario: Scenario, layout: Sequence[int], source: TimeSource, kind: Kind, stages: Sequence[Pass]
) -> StepExtras:
    """The longest time of each part over ranks: they wait for each other at the gradient norm and the next step."""
    found = []
    for rank in range(scenario.pipeline):
        trained = rank_parameters(scenario, rank, layout)[1]
        backward = sum(stages[stage].backward for stage in rank_stages(scenario, rank))
        found.append(source.extras(scenario, kind, trained=trained, last_backward=backward))
    return StepExtras(**{part.name: max(getattr(extras, part.name) for extras in found) for part in fields(StepExtras)})
