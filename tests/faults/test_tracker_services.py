"""Real services: wandb without a network and with a server of its own, and MLflow in a database of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.wandb_server import wandb_server
from tests.tiny_run import environment

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("wandb", "mlflow", "sqlalchemy"))),
    reason="needs the extras wandb and mlflow",
)

BEGIN = """
import json, os, sys, time
from pathlib import Path
from megavl.config.load import load_recipe
from megavl.train.tracker_notes import TrackerNotes
from megavl.train.tracker_services import SERVICES
from megavl.train.wandb_files import WandbFiles

def start(name, folder):
    Path(folder).mkdir(exist_ok=True)
    recipe = load_recipe("launch/recipes/tiny/stage2.yaml", overrides=["run.dir=" + json.dumps(str(folder))])
    notes = TrackerNotes(Path(folder) / f"tracker_{name}.json")
    notes.begin(identifier="c" * 32, recipe="")
    return SERVICES[name](recipe, notes)

def show(value):
    print("found", json.dumps(value), flush=True)
"""
WANDB = BEGIN + "run = start('wandb', sys.argv[1])\nshow(run.last_step('train'))\n"
KILL = "os.kill(os.getpid(), 9)\n"


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's account gets these rows."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def found(program: str, *words: object) -> list[Any]:
    """What a program shows, in a process of its own: both libraries start threads."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode in (0, -9), done.stderr
    return [json.loads(line.removeprefix("found ")) for line in done.stdout.splitlines() if line.startswith("found ")]


def test_rows_that_the_network_lost_are_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        run = tmp_path / "run"
        # Killed before its first row; the service knows the run from then on.
        assert found(WANDB + KILL, run) == [-1] and server.exists
        assert found(WANDB + "run.log('train', {'x': 1.0}, step=1); run.end(code=75)", run) == [-1]
        server.down = True
        rows = """
for step in range(2, 600):
    run.log("train", {f"x{number}": 1.5 for number in range(12)}, step=step)
until = time.monotonic() + 300
while WandbFiles(Path(sys.argv[1]), run._local._notes).last_step("train", online=True) < 9:
    assert time.monotonic() < until
    time.sleep(1)
"""
        assert found(WANDB + rows + KILL, run) == [1]
        server.down = False
        again = "run.log('train', {'x': 2.0}, step=2); run.end(code=0)"
        assert found(WANDB + again, run) == [1]
        assert [row["train/step"] for row in server.rows] == [1, 2]
        # Without the service, nobody knows what it got.
        monkeypatch.setenv("WANDB_MODE", "offline")
        (last,) = found(WANDB, run)
        assert last >= 9


def test_removed_offline_files_are_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    # Exported, but empty.
    monkeypatch.setenv("WANDB_MODE", "")
    rows = "for step in (1, 2, 3): run.log('train', {'x': 1.0}, step=step)\nrun.end(code=75)"
    assert found(WANDB + rows, run) == [-1]
    (folder,) = run.glob("wandb/offline-run-*")
    shutil.rmtree(folder)
    # The file of a killed start lacks what W&B had not written.
    assert found(WANDB + "run.log('train', {'x': 1.0}, step=4)\nrun._local.note()\n" + KILL, run) == [3]
    assert found(WANDB, run) == [3]


MLFLOW = (
    BEGIN
    + """
folder, step = Path(sys.argv[1]), int(sys.argv[2])
picture = folder.parent / "timeline" / f"step_{step}.svg"
picture.parent.mkdir(exist_ok=True)
picture.write_text("<svg/>")
run = start("mlflow", folder)
run.log("train", {"train/loss/a+b": 1.0, "train/loss/a_b": 2.0, "x" * 300: 3.0}, step=step)
run.picture("timeline", picture, step=step)
run.end(code=75)
data = run._client.get_run(run._id)
show([run.last_step("train"), run.last_step("timeline")])
show([file.path for file in run._client.list_artifacts(run._id, "timeline")])
show(sorted(value for name, value in data.data.metrics.items() if not name.endswith("/step")))
show(data.info.run_name)
"""
)


def test_mlflow_follows_a_moved_directory(tmp_path: Path) -> None:
    first, second = tmp_path / "a#x=%zb", tmp_path / "c#d ü%"
    assert found(MLFLOW, first, 1) == [
        [1, 1],
        ["timeline/step_1.svg"],
        [1.0, 2.0, 3.0],
        f"{tmp_path.name}/{first.name}",
    ]
    first.rename(second)
    steps, pictures, values, _ = found(MLFLOW, second, 2)
    assert (steps, values) == ([2, 2], [1.0, 2.0, 3.0])
    assert pictures == ["timeline/step_1.svg", "timeline/step_2.svg"]
    # Nothing is written elsewhere.
    assert sorted(path.name for path in tmp_path.iterdir()) == [second.name, "timeline"]
    assert sorted(path.name for path in second.iterdir()) == ["mlflow", "mlflow.db", "tracker_mlflow.json"]


def test_a_path_that_no_database_can_have_is_named(tmp_path: Path) -> None:
    program = BEGIN + "try: start('mlflow', sys.argv[1])\nexcept ValueError as error: show(str(error))"
    (text,) = found(program, tmp_path / "a?b")
    assert "a?b/mlflow.db.part: `?` and `%`" in text and "rename run.dir, or set MLFLOW_TRACKING_URI" in text
    assert [path.name for path in tmp_path.iterdir()] == ["a?b"]


def test_mlflow_completes_what_a_kill_left_out(tmp_path: Path) -> None:
    program = (
        BEGIN
        + """
from mlflow.tracking import MlflowClient
folder = sys.argv[1]
os.environ["MLFLOW_TRACKING_URI"] = address = f"sqlite:///{folder}/server.db"
find, log, asked, logged = MlflowClient.get_experiment_by_name, MlflowClient.log_batch, [], []

def find_later(self, name):
    # Another run makes the experiment in between.
    asked.append(name)
    return find(self, name) if len(asked) > 1 else None

def log_once(self, *words, **more):
    logged.append(words)
    if len(logged) > 1:
        raise KeyboardInterrupt
    log(self, *words, **more)

MlflowClient(address).create_experiment("megavl")
MlflowClient.get_experiment_by_name, MlflowClient.log_batch = find_later, log_once
try:
    start("mlflow", f"{folder}/run")
except KeyboardInterrupt:
    show(len(logged))
MlflowClient.get_experiment_by_name, MlflowClient.log_batch = find, log
for _ in range(2):
    run = start("mlflow", f"{folder}/run")
    (found,) = run._client.search_runs(["1"])
    show([len(found.data.params), found.data.params["optimizer.lr"], found.data.tags["dir"]])
"""
    )
    calls, first, second = found(program, tmp_path)
    assert calls == 2 and first == second
    assert first[0] > 100 and float(first[1]) > 0 and first[2] == str(tmp_path / "run")
