"""What trackers are sent: each row once, whatever fails, hangs or is killed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megavl.config.errors import UsageError
from megavl.config.load import load_recipe
from megavl.config.recipe import Recipe
from megavl.train import trackers
from megavl.train.tracker_services import _name
from megavl.train.trackers import Trackers, require_trackers


class Fake:
    """A service in memory; runs by id."""

    runs: dict[str, list[Any]]

    def __init__(self, recipe: Recipe, identifier: str) -> None:
        self.rows = self.runs.setdefault(identifier, [])

    def last_step(self, kind: str) -> int:
        return max((row[1] for row in self.rows if isinstance(row, tuple) and row[0] == kind), default=-1)

    def log(self, kind: str, scalars: Mapping[str, float], *, step: int) -> None:
        self.rows.append((kind, step, dict(scalars)))

    def picture(self, kind: str, path: Path, *, step: int) -> None:
        self.rows.append((kind, step, path.name))

    def end(self, *, code: int) -> None:
        self.rows.append(code)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    Fake.runs = {}
    monkeypatch.setitem(trackers.SERVICES, "wandb", Fake)
    return Fake.runs


def recipe_in(folder: Path, *, names: tuple[str, ...] = ("wandb",), **training: int) -> Recipe:
    recipe = load_recipe("launch/recipes/tiny/stage2.yaml", overrides=[f"run.dir={folder}"])
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, trackers=names),
        training=dataclasses.replace(recipe.training, **training),
    )


def start(recipe: Recipe, *, start_step: int = 0) -> Trackers:
    path = Path(recipe.run.dir) / "metrics.jsonl"
    return Trackers(recipe, start_step=start_step, rows={"train": (path, lambda row: {"loss": row["loss"]})})


def row(recipe: Recipe, found: Trackers, step: int) -> None:
    """A step's row, in the file and sent."""
    with (Path(recipe.run.dir) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": step / 2}) + "\n")
    found.write({"loss": step / 2}, step=step, kind="train")


def test_a_restart_sends_no_row_twice(tmp_path: Path, runs: dict[str, list[Any]]) -> None:
    recipe = recipe_in(tmp_path)
    first = start(recipe)
    for step in (1, 2, 3):
        row(recipe, first, step)
    first.write({"accuracy": 0.5}, step=2, kind="evaluation")
    first.close(code=75)
    # Killed after step 3, with a checkpoint of step 2. The service never wrote steps 2 and 3; a line is torn.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (rows,) = runs.values()
    del rows[1:3]
    again = start(recipe, start_step=2)
    for step in (3, 4):
        again.write({"loss": step / 2}, step=step, kind="train")
    again.write({"accuracy": 0.5}, step=2, kind="evaluation")
    picture = tmp_path / "timeline" / "step_4.svg"
    again.picture(picture, step=4)
    again.close(code=0)
    assert rows == [
        *(("train", 1, {"loss": 0.5}), ("evaluation", 2, {"accuracy": 0.5}), 75),
        *(("train", step, {"loss": step / 2}) for step in (2, 3, 4)),
        *(("timeline", 4, "step_4.svg"), 0),
    ]
    assert len(runs) == 1


def test_another_recipe_from_the_start_is_another_run(tmp_path: Path, runs: dict[str, list[Any]]) -> None:
    start(recipe_in(tmp_path)).close(code=7)
    start(recipe_in(tmp_path)).close(code=7)
    assert len(runs) == 1
    start(recipe_in(tmp_path, max_bad_steps=7), start_step=3).close(code=7)
    assert len(runs) == 1
    start(recipe_in(tmp_path, max_bad_steps=9)).close(code=7)
    assert len(runs) == 2


@pytest.mark.parametrize("notes", ["", "[", "[]", '{"id": 3, "recipe": ""}', '{"id": "a"}', "\udcff"])
def test_damaged_notes_begin_a_run(tmp_path: Path, runs: dict[str, list[Any]], notes: str) -> None:
    (tmp_path / "tracker_wandb.json").write_bytes(notes.encode(errors="surrogateescape"))
    recipe = recipe_in(tmp_path)
    found = start(recipe)
    row(recipe, found, 1)
    found.close(code=0)
    assert list(runs.values()) == [[("train", 1, {"loss": 0.5}), 0]]


def test_a_failing_service_is_left(
    tmp_path: Path, runs: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Fake, kind: str, scalars: Mapping[str, float], *, step: int) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(Fake, "log", fail)
    found = start(recipe_in(tmp_path))
    for step in range(1, 4):
        found.write({}, step=step, kind="train")
    found.close(code=0)
    printed = capsys.readouterr().err
    assert printed.count("warning") == 1 and "wandb: ConnectionError: no route; training goes on" in printed


def test_a_hanging_service_costs_rows_alone(
    tmp_path: Path, runs: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(Fake, "log", lambda self, kind, scalars, *, step: goes_on.wait())
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(trackers, "_WAITING", 2)
    found = start(recipe_in(tmp_path))
    for step in range(1, 9):
        found.write({}, step=step, kind="train")
    began = time.monotonic()
    found.close(code=0)
    assert time.monotonic() - began < 300
    printed = capsys.readouterr().err
    assert printed.count("wandb is too slow") == 1 and printed.count("wandb does not answer") == 1
    goes_on.set()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"run\.trackers: mlflow is not installed; pip install 'megavl\[mlflow\]'"):
        require_trackers(recipe_in(tmp_path, names=("mlflow",)).run)


def test_names_that_mlflow_refuses_are_changed() -> None:
    names = {"train/loss": "train/loss", "a/../b": "a/_/b", "ocr+vqa/x": "ocr_vqa/x", "q(1).jsonl": "q_1_.jsonl"}
    assert {name: _name(name) for name in names} == names


def test_old_rows_of_other_settings_are_named(
    tmp_path: Path, runs: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(recipe_in(tmp_path))
    for step in (1, 2, 3):
        row(recipe_in(tmp_path), first, step)
    first.close(code=6)
    again = start(recipe_in(tmp_path, max_bad_steps=7), start_step=1)
    again.write({"loss": 9.0}, step=2, kind="train")
    again.close(code=0)
    assert "wandb keeps the train rows of steps 2 to 3, which other settings gave" in capsys.readouterr().err
