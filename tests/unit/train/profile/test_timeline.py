"""Records of several ranks and hosts become one timeline on one clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavl.config.recipe import ParallelConfig
from megavl.config.run import RunConfig
from megavl.parallel import groups
from megavl.parallel.groups import Position
from megavl.planner.report.svg import Segment
from megavl.planner.scenario import make_scenario
from megavl.train.profile.step_profiler import Record
from megavl.train.profile.timeline import align, measured_panel, write_timeline
from megavl.train.run_plan import RunPlan
from tests.unit.planner.recipes import recipe_of


def record(rank: int, *, host: str, zero: float, start: float, replica: int = 0, tensor: int = 0) -> Record:
    """A forward pass of one second, then an optimizer step of one second."""
    position = Position(
        rank=rank, world_size=4, tp_rank=tensor, tp_size=2, pp_rank=0, pp_size=1, dp_rank=replica, dp_size=2
    )
    boxes = (
        Segment(rank=rank, start=start, end=start + 1, what="decoder forward", micro_batch=0, stage=0),
        Segment(rank=rank, start=start + 1, end=start + 2, what="optimizer"),
    )
    return Record(position=position, host=host, zero=zero, segments=boxes)


def test_clocks_of_hosts_are_aligned() -> None:
    records = [
        record(0, host="a", zero=100.0, start=1.0),
        record(1, host="a", zero=100.5, start=1.0),
        record(2, host="b", zero=7000.0, start=1.0),
        record(3, host="b", zero=7000.25, start=1.0),
    ]
    assert [found.segments[0].start for found in align(records)] == [1.0, 1.5, 1.0, 1.25]


def test_rows_go_by_replica_and_tensor_rank() -> None:
    scenario = make_scenario(recipe_of(tensor=2), devices=4)
    # megatron-core numbers tensor ranks first; the records come in any order.
    records = [record(n, host="a", zero=0, start=float(n), replica=n // 2, tensor=n % 2) for n in (3, 0, 2, 1)]
    panel = measured_panel(records, scenario=scenario, layout=(30,), modality="text", seconds=9.0)
    assert [name.split(", rank")[0] for name in panel.ranks] == [
        f"replica {replica}, tensor {tensor}" for replica in range(2) for tensor in range(2)
    ]
    assert [(box.rank, box.start) for box in panel.segments if box.micro_batch == 0] == [
        (n, float(n)) for n in range(4)
    ]
    # The schedule lasts from the first pass of any rank to the last one of any; the optimizer is not part of it.
    assert panel.busy == (0.25,) * 4
    assert (panel.bubble, panel.seconds) == (0.75, 9.0)


@pytest.fixture
def world() -> Iterator[None]:
    """A world of one process."""
    groups.start(ParallelConfig(), seed=1)
    yield
    groups.stop()


@pytest.mark.usefixtures("world")
def test_unwritable_timelines_only_warn(tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe_of(), run=RunConfig(dir=str(tmp_path / "missing")))
    plan = RunPlan(scenario=make_scenario(recipe), device=None, layers=(30,), position=groups.position())
    found = record(0, host="a", zero=0, start=1.0)
    line = write_timeline(found, plan=plan, step=3, modality="text", seconds=2.0)
    assert line.startswith("warning: run.timeline_steps: cannot write ") and "training goes on" in line
