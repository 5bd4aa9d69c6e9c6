"""A step as a picture (SVG) and as a trace for Perfetto or chrome://tracing (JSON); `panel` simulates it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from megavl.config.errors import UsageError
from megavl.config.identity import model_name
from megavl.planner.report.svg import Panel, Segment, draw
from megavl.planner.scenario import Kind, Scenario
from megavl.planner.simulation.predict import kinds_of, slowest_extras, stage_passes
from megavl.planner.simulation.simulate import Event, Run, simulate
from megavl.planner.simulation.times import BlockTimes, StepExtras, TimeSource

MOST_ROUNDS = {".svg": 4, ".json": 64}
"""Most rounds of p micro-batches that a picture and a trace show."""


def write_timeline(path: str | Path, scenario: Scenario, layout: tuple[int, ...], source: TimeSource) -> None:
    """Simulate one step of each kind and write it as `.svg` or `.json`.

    Raises:
        UsageError: another suffix, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in MOST_ROUNDS:
        raise UsageError(f"--timeline: {path} ends in {target.suffix or 'nothing'}; name a .svg or a .json file")
    limit = MOST_ROUNDS[target.suffix] * scenario.pipeline
    panels = [panel(scenario, layout, source, kind, most=limit) for kind in kinds_of(scenario)]
    text = draw(panels, title=title(scenario, layout, source.name)) if target.suffix == ".svg" else trace(panels)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--timeline: cannot write {path}: {error}; choose a writable place") from error


def title(scenario: Scenario, layout: Sequence[int], origin: str) -> str:
    """Model, layout and the source of the times."""
    virtual = f" x virtual {scenario.virtual}" if scenario.virtual > 1 else ""
    return (
        f"{model_name(scenario.recipe.model)}, tensor {scenario.tensor} x pipeline {scenario.pipeline}{virtual} x data "
        f"{scenario.data_parallel}, layers {'+'.join(map(str, layout))}, vision {scenario.vision}; {origin}"
    )


def panel(
    scenario: Scenario, layout: tuple[int, ...], source: TimeSource, kind: Kind, *, most: int | None = None
) -> Panel:
    """Simulate one kind of step, at most `most` micro-batches of it."""
    whole, times = scenario.micro_batches, source.blocks(scenario, kind)
    stages = stage_passes(times, layout)
    count = whole if most is None else min(whole, most)
    # Work that grows with the step, such as encoding before the pipeline, is drawn for as many micro-batches.
    scenario = _with_micro_batches(scenario, count)
    run = simulate(
        pipeline=scenario.pipeline,
        virtual=scenario.virtual,
        costs=[stages],
        kinds=[0] * count,
        transfer_s=source.transfer(scenario),
        slowdown=source.slowdown(scenario),
    )
    extras = slowest_extras(scenario, layout, source, kind, stages)
    segments = [part for event in run.events for part in _parts(event, times, layout)]
    segments += _transfers(run, source.transfer(scenario))
    shifted = [_moved(part, extras.before) for part in segments]
    end = run.seconds + extras.before
    return Panel(
        kind=kind,
        segments=tuple(shifted + _outside(extras, pipeline=scenario.pipeline, begin=end)),
        ranks=tuple(row_name(scenario, rank, layout) for rank in range(scenario.pipeline)),
        busy=tuple(busy / run.seconds for busy in run.busy),
        seconds=run.seconds + extras.total,
        bubble=run.bubble,
        micro_batches=count,
        whole=whole,
    )


def _with_micro_batches(scenario: Scenario, micro_batches: int) -> Scenario:
    """The same run with smaller steps."""
    training = scenario.recipe.training
    batch = micro_batches * training.micro_batch_size * scenario.data_parallel
    training = dataclasses.replace(training, global_batch_size=batch)
    return dataclasses.replace(scenario, recipe=dataclasses.replace(scenario.recipe, training=training))


def trace(panels: Sequence[Panel]) -> str:
    """Trace Event Format: one process per kind of step, one thread per row, microseconds."""
    events: list[dict[str, object]] = []
    for process, part in enumerate(panels):
        events.append(_named("process_name", process, 0, f"{part.kind} step"))
        for rank, name in enumerate(part.ranks):
            events.append(_named("thread_name", process, rank, name))
        for box in part.segments:
            mark = "" if box.micro_batch is None else f" {box.micro_batch}"
            events.append(
                {
                    "name": f"{box.what}{mark}",
                    "cat": box.what,
                    "ph": "X",
                    "ts": round(box.start * 1e6, 3),
                    "dur": round((box.end - box.start) * 1e6, 3),
                    "pid": process,
                    "tid": box.rank,
                    "args": {"micro_batch": box.micro_batch, "stage": box.stage},
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _named(what: str, process: int, thread: int, name: str) -> dict[str, object]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def row_name(scenario: Scenario, rank: int, layout: Sequence[int]) -> str:
    """Name of a pipeline rank's row: what it holds."""
    held = layout[rank :: scenario.pipeline]
    first = "encoders + " if rank == 0 and scenario.vision != "split_all" else ""
    head = " + head" if rank == scenario.pipeline - 1 else ""
    return f"rank {rank}: {first}{'+'.join(map(str, held))} layers{head}"


def _parts(event: Event, times: BlockTimes, layout: Sequence[int]) -> list[Segment]:
    """A pass as boxes: encoders, decoder, head in the forward pass, the reverse in the backward pass."""
    step, last = event.step, len(layout) - 1
    passes = [
        ("encoders", times.vision if step.stage == 0 else None),
        ("decoder", times.layer * layout[step.stage] + (times.embedding if step.stage == 0 else times.layer * 0)),
        ("head", times.head if step.stage == last else None),
    ]
    way = "backward" if step.backward else "forward"
    named = [(f"{name} {way}", getattr(cost, way)) for name, cost in passes if cost is not None]
    if step.backward:
        named.reverse()
    whole, start, out = sum(seconds for _, seconds in named), event.start, []
    for name, seconds in named:
        end = start + (event.end - event.start) * (seconds / whole if whole else 0.0)
        if end > start:
            out.append(
                Segment(
                    rank=event.rank, start=start, end=end, what=name, micro_batch=step.micro_batch, stage=step.stage
                )
            )
        start = end
    return out


def _transfers(run: Run, transfer_s: float) -> list[Segment]:
    """The last transfer of every exchange; before it, a rank waits for its peer."""
    return [
        Segment(rank=wait.rank, start=max(wait.start, wait.end - transfer_s), end=wait.end, what="transfer")
        for wait in run.waits
        if transfer_s > 0
    ]


def _moved(part: Segment, seconds: float) -> Segment:
    return dataclasses.replace(part, start=part.start + seconds, end=part.end + seconds)


def _outside(extras: StepExtras, *, pipeline: int, begin: float) -> list[Segment]:
    """Work of every rank before and after the schedule."""
    out = []
    if extras.before:
        out += [Segment(rank=rank, start=0.0, end=extras.before, what="encoders forward") for rank in range(pipeline)]
    for what, seconds in (
        ("encoders backward", extras.after + extras.dummy_image),
        ("gradient reduction", extras.reduce),
        ("optimizer", extras.update),
        ("loading", extras.loading),
    ):
        if seconds:
            out += [Segment(rank=rank, start=begin, end=begin + seconds, what=what) for rank in range(pipeline)]
            begin += seconds
    return out
