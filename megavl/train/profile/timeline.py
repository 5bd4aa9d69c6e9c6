"""The measured timeline of a step, in the form of a simulated one: JSON of all ranks, SVG of the first replica."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megavl.config.recipe import Recipe
from megavl.data.batch import Modality
from megavl.parallel.groups import Position
from megavl.planner.report.svg import Panel, draw
from megavl.planner.report.timeline import row_name, title, trace
from megavl.planner.scenario import Scenario, make_scenario
from megavl.train.profile.step_profiler import Record

FOLDER = "timeline"
"""In run.dir."""


def write_timeline(
    record: Record, *, recipe: Recipe, layout: tuple[int, ...], step: int, modality: Modality, seconds: float
) -> str:
    """Gather a step's records and write them to `<run.dir>/timeline/step_NNNNNN.json` and `.svg`. Collective.

    Args:
        record: this rank's.
        recipe: of the run.
        layout: decoder layers per stage.
        step: 1 for the first.
        modality: of the step.
        seconds: of the step.

    Returns:
        A line for people: where it is, or why it is not; a disk that is full for a picture is no reason to end a run.
    """
    world = dist.get_world_size()
    found: list[Record | None] | None = [None] * world if dist.get_rank() == 0 else None
    dist.gather_object(record, found, dst=0)
    if found is None:
        return ""
    records = align([entry for entry in found if entry is not None])
    scenario = make_scenario(recipe, devices=world)
    whole, first = (
        measured_panel(part, scenario=scenario, layout=layout, modality=modality, seconds=seconds)
        for part in (records, [entry for entry in records if entry.position.dp_rank == 0])
    )
    path = Path(recipe.run.dir, FOLDER, f"step_{step:06d}.svg")
    try:
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".json").write_text(trace([whole]), encoding="utf-8")
        path.write_text(draw([first], title=title(scenario, layout, f"measured, step {step}")), encoding="utf-8")
    except OSError as error:
        return f"warning: run.timeline_steps: cannot write {path}: {error}; training goes on without it"
    return f"timeline of step {step}: {path}"


def align(records: Sequence[Record]) -> list[Record]:
    """All records on one clock, whose zero is the beginning of the step.

    Ranks of a host share its clock. Hosts are set against each other by the moment at which the first of their ranks
    left the barrier before the step, so they are off by what a barrier takes.
    """
    zeros: dict[str, float] = {}
    for record in records:
        zeros[record.host] = min(record.zero, zeros.get(record.host, record.zero))
    out = []
    for record in records:
        late = record.zero - zeros[record.host]
        moved = (dataclasses.replace(box, start=box.start + late, end=box.end + late) for box in record.segments)
        out.append(dataclasses.replace(record, zero=zeros[record.host], segments=tuple(moved)))
    return out


def measured_panel(
    records: Sequence[Record], *, scenario: Scenario, layout: Sequence[int], modality: Modality, seconds: float
) -> Panel:
    """One row per rank: replica by replica, stage by stage."""

    def place(record: Record) -> tuple[int, int, int]:
        return record.position.dp_rank, record.position.pp_rank, record.position.tp_rank

    rows = sorted(records, key=place)
    segments = [dataclasses.replace(box, rank=row) for row, record in enumerate(rows) for box in record.segments]
    passes = [box for box in segments if box.micro_batch is not None]
    schedule = max(box.end for box in passes) - min(box.start for box in passes)
    spent = [0.0] * len(rows)
    for box in passes:
        spent[box.rank] += box.end - box.start
    busy = tuple(part / schedule for part in spent)
    return Panel(
        kind=modality,
        segments=tuple(segments),
        ranks=tuple(_name(record.position, scenario, layout) for record in rows),
        busy=busy,
        seconds=seconds,
        bubble=1.0 - sum(busy) / len(busy),
        micro_batches=scenario.micro_batches,
        whole=scenario.micro_batches,
    )


def _name(position: Position, scenario: Scenario, layout: Sequence[int]) -> str:
    replica = f"replica {position.dp_rank}, " if position.dp_size > 1 else ""
    tensor = f"tensor {position.tp_rank}, " if position.tp_size > 1 else ""
    return f"{replica}{tensor}{row_name(scenario, position.pp_rank, layout)}"
