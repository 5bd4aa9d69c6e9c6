"""Traces of steps: what cannot be recorded is refused, and what cannot be written costs the trace alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megavl.config.errors import UsageError
from megavl.config.run import RunConfig
from megavl.parallel.groups import Position
from megavl.planner.scenario import make_scenario
from megavl.train.profile.step_traces import StepTraces, require_traceable
from megavl.train.run_plan import RunPlan
from tests.unit.planner.recipes import recipe_of

FIRST = Position(rank=0, world_size=4, tp_rank=0, tp_size=2, pp_rank=0, pp_size=1, dp_rank=0, dp_size=2)


def traces(run_dir: Path, *, position: Position = FIRST) -> StepTraces:
    recipe = dataclasses.replace(recipe_of(), run=RunConfig(dir=str(run_dir), profile_steps=(2,)))
    return StepTraces(RunPlan(scenario=make_scenario(recipe), device=None, layers=(30,), position=position))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where CUDA is absent")
def test_memory_snapshot_without_cuda_is_refused() -> None:
    with pytest.raises(UsageError, match=r"run\.memory_snapshot_step: 3 needs CUDA.*run\.profile_steps"):
        require_traceable(RunConfig(dir="run", memory_snapshot_step=3))
    require_traceable(RunConfig(dir="run", profile_steps=(3,)))


def test_trace_that_cannot_be_written_only_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("no folder")
    recorder = traces(tmp_path)
    recorder.begin(2)
    recorder.end()
    printed = capsys.readouterr().out
    assert printed.startswith("warning: run.profile_steps: cannot write ") and "training goes on" in printed
    assert (tmp_path / "profile").read_text() == "no folder"


def test_other_steps_and_replicas_write_nothing(tmp_path: Path) -> None:
    others = [dataclasses.replace(FIRST, rank=2, dp_rank=1), dataclasses.replace(FIRST, rank=1, tp_rank=1)]
    for recorder, step in ((traces(tmp_path), 1), *((traces(tmp_path, position=other), 2) for other in others)):
        recorder.begin(step)
        recorder.end()
    assert not (tmp_path / "profile").exists()
