"""What trackers are sent: each row once, whatever fails, hangs or is killed."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
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
from megavl.train.tracker_notes import TrackerNotes
from megavl.train.tracker_services import _name
from megavl.train.trackers import Trackers, leave_past_services, require_trackers


class Fake:
    """A service in memory; runs by id."""

    runs: dict[str, list[Any]]

    def __init__(self, recipe: Recipe, notes: TrackerNotes) -> None:
        self.rows = self.runs.setdefault(notes.identifier, [])

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


def recipe_in(folder: Path, *changes: str, names: tuple[Any, ...] = ("wandb",), **training: int) -> Recipe:
    recipe = load_recipe("launch/recipes/tiny/stage2.yaml", overrides=[f"run.dir={folder}", *changes])
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, trackers=names),
        training=dataclasses.replace(recipe.training, **training),
    )


def start(recipe: Recipe, *, start_step: int = 0, **more: Any) -> Trackers:
    path = Path(recipe.run.dir) / "metrics.jsonl"
    return Trackers(recipe, start_step=start_step, rows={"train": (path, lambda row: {"loss": row["loss"]})}, **more)


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


def test_other_weights_or_data_are_another_run(tmp_path: Path, runs: dict[str, list[Any]]) -> None:
    starts = [(f"checkpoint.init={init}", data) for init, data in (("/a", "1"), ("/b", "1"), ("/b", "2"))]
    for change, data in starts:
        found = start(recipe_in(tmp_path, change), fingerprint=data)
        found.write({"loss": 1.0}, step=1, kind="train")
        found.close(code=7)
    assert list(runs.values()) == [[("train", 1, {"loss": 1.0}), 7]] * 3


def test_a_repeated_start_names_the_rows_kept(
    tmp_path: Path, runs: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for loss in (1.0, 2.0):
        found = start(recipe_in(tmp_path))
        found.write({"loss": loss}, step=1, kind="train")
        found.close(code=7)
    assert list(runs.values()) == [[("train", 1, {"loss": 1.0}), 7, 7]]
    assert "wandb keeps the train rows of steps 1 to 1, which an earlier start gave" in capsys.readouterr().err


def test_a_copied_directory_is_another_run(
    tmp_path: Path, runs: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    original, copy, moved = recipe_in(tmp_path / "a"), recipe_in(tmp_path / "b"), recipe_in(tmp_path / "c")
    Path(original.run.dir).mkdir()
    first = start(original)
    row(original, first, 1)
    first.close(code=75)
    shutil.copytree(original.run.dir, copy.run.dir)
    second = start(copy, start_step=1)
    row(copy, second, 2)
    second.close(code=0)
    assert f"{copy.run.dir} is a copy of {original.run.dir}; it gets a run of its own" in capsys.readouterr().err
    Path(original.run.dir).rename(moved.run.dir)
    third = start(moved, start_step=1)
    row(moved, third, 2)
    third.close(code=0)
    first_rows = [("train", step, {"loss": step / 2}) for step in (1, 2)]
    assert list(runs.values()) == [[first_rows[0], 75, first_rows[1], 0], [*first_rows, 0]]
    assert capsys.readouterr().err == ""


def test_a_directory_mounted_twice_is_no_copy(tmp_path: Path, runs: dict[str, list[Any]]) -> None:
    recipe, path = recipe_in(tmp_path / "a"), tmp_path / "a" / "tracker_wandb.json"
    path.parent.mkdir()
    start(recipe).close(code=75)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / path.name).hardlink_to(path)
    start(recipe_in(tmp_path / "b")).close(code=75)
    assert len(runs) == 1


@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
def test_a_failing_service_is_left(
    tmp_path: Path,
    runs: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
) -> None:
    def fail(self: Fake, kind: str, scalars: Mapping[str, float], *, step: int) -> None:
        raise error("no\nroute")

    monkeypatch.setattr(Fake, "log", fail)
    found = start(recipe_in(tmp_path))
    for step in range(1, 4):
        found.write({}, step=step, kind="train")
    found.close(code=0)
    printed = capsys.readouterr().err
    assert printed.count("warning") == 1 and f"wandb: {error.__name__}: no route; training goes on" in printed


def test_a_failing_picture_costs_no_row(
    tmp_path: Path, runs: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Fake, kind: str, path: Path, *, step: int) -> None:
        raise OSError("no boto3")

    monkeypatch.setattr(Fake, "picture", fail)
    recipe = recipe_in(tmp_path)
    found = start(recipe)
    for step in (1, 2):
        row(recipe, found, step)
        found.picture(tmp_path / "timeline" / f"{step}.svg", step=step)
    found.close(code=0)
    assert list(runs.values()) == [[("train", 1, {"loss": 0.5}), ("train", 2, {"loss": 1.0}), 0]]
    printed = capsys.readouterr().err
    assert printed.count("warning") == 1 and "1.svg (OSError: no boto3); rows go on" in printed


def test_pictures_of_earlier_starts_are_sent(tmp_path: Path, runs: dict[str, list[Any]]) -> None:
    pictures = [(step, tmp_path / "timeline" / f"{step}.svg") for step in (1, 2, 3, 4)]
    pictures[0][1].parent.mkdir()
    for step, path in pictures:
        if step != 2:
            path.touch()
    again = start(recipe_in(tmp_path), start_step=3, pictures=pictures)
    again.close(code=0)
    assert list(runs.values()) == [[("timeline", 1, "1.svg"), ("timeline", 3, "3.svg"), 0]]


def test_a_slow_service_still_ends_its_run(
    tmp_path: Path, runs: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def wait(self: Fake, kind: str, scalars: Mapping[str, float], *, step: int) -> None:
        begun.set()
        goes_on.wait()

    monkeypatch.setattr(Fake, "log", wait)
    monkeypatch.setattr(trackers, "_WAITING", 2)
    found = start(recipe_in(tmp_path))
    found.write({}, step=1, kind="train")
    begun.wait()
    for step in (2, 3):
        found.write({}, step=step, kind="train")
    # The queue is full, and the time for rows is over.
    (sender,) = found._senders
    sender.end(code=5, until=time.monotonic() - 1)
    goes_on.set()
    sender.wait(time.monotonic() + 300)
    assert list(runs.values()) == [[5]]
    assert "wandb is too slow; metrics.jsonl has the last rows, and another start" in capsys.readouterr().err


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
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    leave_past_services(5)
    goes_on.set()
    for sender in found._senders:
        sender.wait(time.monotonic() + 300)
    leave_past_services(6)
    assert codes == [5]


@pytest.mark.parametrize(("name", "extra"), [("mlflow", "mlflow"), ("tensorboard", "board")])
@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str, folder: bool
) -> None:
    # What Python finds for a folder of that name without code.
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True) if folder else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UsageError, match=rf"run\.trackers: {name} is not installed; pip install 'megavl\[{extra}\]'"):
        require_trackers(recipe_in(tmp_path, names=(name,)).run)


def test_tensorboard_is_one_of_the_trackers(tmp_path: Path, runs: dict[str, list[Any]]) -> None:
    recipe = recipe_in(tmp_path, "run.tensorboard=false", "run.trackers=[wandb,tensorboard]", names=("tensorboard",))
    assert recipe.run.board and not recipe_in(tmp_path, "run.tensorboard=false").run.board
    found = start(recipe)
    row(recipe, found, 1)
    found.close(code=0)
    assert runs == {}


def test_names_that_mlflow_refuses_are_changed() -> None:
    long = "train/loss/" + "x" * 260
    changed = {"a/../b": "a/_/b", "ocr+vqa/x": "ocr_vqa/x", "q(1).jsonl": "q_1_.jsonl", long: long[:241]}
    for name, begins in changed.items():
        # A hash keeps them apart from names that are like them.
        assert re.fullmatch(re.escape(begins) + "-[0-9a-f]{8}", _name(name))
    assert len(_name(long)) == 250 and _name(long) != _name(long + "x")
    assert _name("train/loss/a_b") == "train/loss/a_b" and _name("a+b") != _name("a*b")


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
