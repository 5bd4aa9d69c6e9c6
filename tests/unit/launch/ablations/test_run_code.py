"""When a run counts as done: it says so, and its logs end at its last step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.ablations.definition import read_ablation
from launch.ablations.graph import build_graph
from launch.ablations.runner import _code_of_run, _reason
from megavl.config.recipe import Recipe
from tests.unit.launch.ablations.test_definition import FOLDER


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Of two steps each; only the last is evaluated."""
    monkeypatch.chdir(FOLDER.parents[1])
    runs = build_graph(read_ablation(FOLDER / "figure8.yaml"), size="smoke", seeds=1).cells[0].runs
    return [run.recipe for run in runs if run.recipe]


def leave(folder: Path, *, code: int = 0, trained: int = 2, evaluated: int = 2) -> Path:
    """A folder as a run leaves it."""
    run = folder / "run"
    run.mkdir()
    (run / "exit_status.json").write_text(json.dumps({"code": code}))
    for name, last in (("metrics", trained), ("evaluation", evaluated)):
        rows = [{"step": step, "modality": "text", "tokens": 9, "step_time_s": 0.1} for step in range(1, last + 1)]
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_complete_run_is_done(tmp_path: Path, recipes: list[Recipe]) -> None:
    assert _code_of_run(leave(tmp_path), recipes[-1]) == 0


@pytest.mark.parametrize(
    ("left", "code"), [({"code": 1}, 7), ({"trained": 1}, 3), ({"evaluated": 1}, 3), ({"evaluated": 0}, 3)]
)
def test_run_without_its_last_step_fails(
    tmp_path: Path, recipes: list[Recipe], left: dict[str, int], code: int
) -> None:
    assert _code_of_run(leave(tmp_path, **left), recipes[-1]) == code


def test_run_that_evaluates_nothing_needs_no_evaluation(tmp_path: Path, recipes: list[Recipe]) -> None:
    assert _code_of_run(leave(tmp_path, evaluated=0), recipes[0]) == 0


def test_job_that_only_began_is_not_done(tmp_path: Path, recipes: list[Recipe]) -> None:
    assert _code_of_run(tmp_path, recipes[0]) == 7


def test_failed_evaluation_is_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("step 300\nwarning: no evaluation after step 300: x.jsonl: gone; training goes on\ndone\n")
    assert _reason(log) == "warning: no evaluation after step 300: x.jsonl: gone; training goes on"
