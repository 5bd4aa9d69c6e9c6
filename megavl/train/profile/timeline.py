"""Timelines of measured steps, in the form of simulated ones: JSON of all ranks, SVG of the first replica."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megavl.data.batch import Modality
from megavl.parallel.groups import Position
from megavl.planner.report.svg import Panel, draw
from megavl.planner.report.timeline import row_name, title, trace
from megavl.planner.scenario import Scenario
from megavl.train.model_chunks import ModelChunks
from megavl.train.profile.step_profiler import Record, StepProfiler
from megavl.train.run_plan import RunPlan

FOLDER = "timeline"
"""In run.dir."""


class StepTimelines:
    """Records the steps of `run.timeline_steps` and writes each as a timeline; other steps pass through untouched."""

    def __init__(self, plan: RunPlan, model: ModelChunks) -> None:
        self._plan, self._model = plan, model
        self._profiler: StepProfiler | None = None
        self._step = 0

    def begin(self, step: int) -> None:
        """Start the step profiler if this step is to be recorded. Collective then."""
        self._step = step
        if step in self._plan.recipe.run.timeline_steps:
            self._profiler = StepProfiler(self._model, position=self._plan.position)

    def end(self, *, modality: Modality, seconds: float) -> None:
        """Write what was recorded and say where. Collective if this step was recorded."""
        if self._profiler is None:
            return
        record, self._profiler = self._profiler.stop(), None
        self._plan.say(write_timeline(record, plan=self._plan, step=self._step, modality=modality, seconds=seconds))


def write_timeline(record: Record, *, plan: RunPlan, step: int, modality: Modality, seconds: float) -> str:
    """Gather a step's records and write them to `<run.dir>/timeline/step_NNNNNN.json` and `.svg`. Collective.

    Args:
        step: 1 for the first.

    Returns:
        On rank 0 a line that names the file, or a warning: a full disk must not end a run over a picture.
    """
    found: list[Record | None] | None = [None] * plan.position.world_size if plan.position.rank == 0 else None
    dist.gather_object(record, found, dst=0)
    if found is None:
        return ""
    records = align([entry for entry in found if entry is not None])
    first_replica = [entry for entry in records if entry.position.dp_rank == 0]
    whole, first = (
        measured_panel(part, scenario=plan.scenario, layout=plan.layers, modality=modality, seconds=seconds)
        for part in (records, first_replica)
    )
    path = timeline_picture(plan.recipe.run.dir, step)
    try:
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".json").write_text(trace([whole]), encoding="utf-8")
        heading = title(plan.scenario, plan.layers, f"measured, step {step}")
        path.write_text(draw([first], title=heading), encoding="utf-8")
    except OSError as error:
        return f"warning: run.timeline_steps: cannot write {path}: {error}; training goes on without it"
    return f"timeline of step {step}: {path}"


def timeline_picture(run_dir: str, step: int) -> Path:
    """Where the picture of a step is."""
    return Path(run_dir, FOLDER, f"step_{step:06d}.svg")


def align(records: Sequence[Record]) -> list[Record]:
    """All records on one clock, whose zero is the start of the step.

    Ranks of a host share its clock. Clocks of hosts are aligned at the barrier before the step, at the time when the
    first rank of each host left it. So they differ by at most the duration of a barrier.
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
    """One row per rank, sorted by replica, stage and tensor rank."""

    def order(record: Record) -> tuple[int, int, int]:
        return record.position.dp_rank, record.position.pp_rank, record.position.tp_rank

    rows = sorted(records, key=order)
    segments = [dataclasses.replace(box, rank=row) for row, record in enumerate(rows) for box in record.segments]
    passes = [box for box in segments if box.micro_batch is not None]
    schedule = max(box.end for box in passes) - min(box.start for box in passes)
    computing = [0.0] * len(rows)
    for box in passes:
        computing[box.rank] += box.end - box.start
    busy = tuple(seconds / schedule for seconds in computing)
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
