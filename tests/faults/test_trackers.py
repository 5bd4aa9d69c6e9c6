"""Weights & Biases offline and MLflow in a database, real ones: one run each through a kill, every step once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.two_ranks import Ranks
from tests.tiny_run import environment, metrics

SETTINGS = ("run.trackers=[wandb,mlflow]", "run.timeline_steps=[7]", "evaluation.interval=4")

READ_WANDB = """
import json, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2
from megavl.train.wandb_files import records_in
for path in map(Path, sys.argv[1:]):
    for data in records_in(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            print(json.dumps(items))
        elif record.WhichOneof("record_type") == "run":
            print(json.dumps({"run": record.run.run_id, "project": record.run.project}))
"""

READ_MLFLOW = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(f"sqlite:///{sys.argv[1]}")
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        found = {key: [(one.step, one.value) for one in points] for key, points in history.items()}
        files = [file.path for file in client.list_artifacts(run.info.run_id, "timeline")]
        print(json.dumps({"experiment": experiment.name, "status": run.info.status, "metrics": found, "files": files,
                          "lr": run.data.params["optimizer.lr"]}))
"""


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("wandb", "mlflow", "sqlalchemy"))),
    reason="needs the extras wandb and mlflow",
)
def test_a_killed_run_goes_on_in_its_trackers(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody's account gets these rows.
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    run = tmp_path / "run"
    held_out = (f"evaluation.held_out=[{dataset}/shards]", "evaluation.held_out_sequences=2")
    ranks = Ranks(dataset, run, *SETTINGS, *held_out, fault="training:0:6:sigkill")
    codes, printed, _ = ranks.wait()
    assert codes == {0: -9, 1: 7}, printed
    ranks = Ranks(dataset, run, *SETTINGS, *held_out)
    codes, printed, _ = ranks.wait()
    assert codes == {0: 0, 1: 0} and "resuming after step 3" in printed, printed
    assert "run.trackers: wandb has no key; its run stays in" in printed and "warning: run.trackers" not in printed

    losses = [(row["step"], row["loss"]) for row in metrics(run)]
    evaluations = [row["step"] for row in metrics(run, "evaluation.jsonl")]
    assert [step for step, _ in losses] == list(range(1, 9)) and evaluations == [4, 8]

    (found,) = lines(READ_MLFLOW, run / "mlflow.db")
    assert (found["experiment"], found["status"], found["files"]) == (
        "megavl",
        "FINISHED",
        ["timeline/step_000007.svg"],
    )
    assert sorted(map(tuple, found["metrics"]["train/loss"])) == losses and float(found["lr"]) > 0
    assert [step for step, _ in found["metrics"]["evaluation/shards/text/loss"]] == evaluations

    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    records = lines(READ_WANDB, *files)
    assert len({record["run"] for record in records if "run" in record}) == 1
    rows = [record for record in records if "train/loss" in record]
    assert sorted((row["step"], row["train/loss"]) for row in rows) == losses
    assert [record["step"] for record in records if "evaluation/shards/text/loss" in record] == evaluations
    (picture,) = [record for record in records if "timeline/step" in record]
    assert picture["step"] == 7 and len(list(run.glob("wandb/offline-run-*/files/timeline/step_000007.svg"))) == 1


def lines(program: str, *words: object) -> list[dict[str, Any]]:
    """What a program prints as JSON, in an interpreter of its own: both libraries start threads."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    return [json.loads(line) for line in done.stdout.splitlines()]
