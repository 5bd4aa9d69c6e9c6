"""Runs of Weights & Biases and of MLflow, as `trackers.py` uses them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from megavl.config.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from megavl.config.load import to_dict
from megavl.config.recipe import Recipe
from megavl.foreign.printing import say

_PROJECT = "megavl"
_END_S = 50.0
"""Seconds in which Weights & Biases sends its last rows; less than a run waits for it."""


class Service(Protocol):
    """A run of a service. Every method may fail or take long."""

    def last_step(self, kind: str) -> int:
        """Last step of which it has a row of this kind; -1 if it has none."""

    def log(self, kind: str, scalars: Mapping[str, float], *, step: int) -> None:
        """Record a row; it has the step also as a scalar `KIND/step`."""

    def picture(self, kind: str, path: Path, *, step: int) -> None:
        """Record a picture, and its step in the same way."""

    def end(self, *, code: int) -> None:
        """Record the end of the run, or of this start of it."""


class _Wandb:
    """Weights & Biases. Without a key the run stays in run.dir, for `wandb sync`."""

    def __init__(self, recipe: Recipe, identifier: str) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        # What its thread and its end may wait for; its button "Stop" would be taken for Ctrl-C.
        settings: dict[str, Any] = {"finish_timeout": _END_S, "stop_fn": lambda: None, "stop_on_fatal_error": False}
        if mode is None and not wandb.login(prompt=False):
            # It would ask for one on the terminal.
            say(f"run.trackers: wandb has no key; its run stays in {recipe.run.dir}/wandb, `wandb sync` uploads it")
            mode = "offline"
        self._files = sorted(Path(recipe.run.dir).glob(f"wandb/*-{identifier}/run-{identifier}.wandb"))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=Path(recipe.run.dir).name,
            id=identifier,
            resume="allow",
            dir=recipe.run.dir,
            mode=mode,
            config=to_dict(recipe),
            # The terminal stays ours.
            settings=wandb.Settings(console="off", silent=True, **settings),
        )
        # A row of its own for each call, so that no row waits for the next step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def last_step(self, kind: str) -> int:
        local = max((step for path in self._files for step in _steps_in(path, f"{kind}/step")), default=-1)
        if self._run.offline or not self._run.resumed:
            return local
        known = dict(self._run.summary)
        if not known:
            # The service did not say in time. No row is better than one twice.
            raise TimeoutError("it does not say which rows it has")
        return max(local, int(known.get(f"{kind}/step", -1)))

    def log(self, kind: str, scalars: Mapping[str, float], *, step: int) -> None:
        self._run.log({**scalars, "step": step, f"{kind}/step": step})

    def picture(self, kind: str, path: Path, *, step: int) -> None:
        self._run.save(str(path), base_path=str(path.parent.parent), policy="now")
        self.log(kind, {}, step=step)

    def end(self, *, code: int) -> None:
        self._run.finish(exit_code=code)


_BLOCK, _FILE_HEAD, _PART_HEAD = 1 << 15, 7, 7
"""Bytes of a block, of what stands before the first, and of what stands before each part of a record."""


def _steps_in(path: Path, key: str) -> Iterator[int]:
    """Values of a scalar in an offline file of W&B: LevelDB's log format, with its protocol buffers.

    A kill leaves rows out of the file that W&B has not written yet, and may tear the last one.
    """
    from wandb.proto import wandb_internal_pb2

    records: Any = wandb_internal_pb2
    for data in _records_in(path.read_bytes()):
        record = records.Record.FromString(data)
        for item in record.history.item:
            if key in (item.key, "/".join(item.nested_key)):
                yield int(json.loads(item.value_json))


def _records_in(data: bytes) -> Iterator[bytes]:
    position, record = _FILE_HEAD, b""
    while position + _PART_HEAD <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _PART_HEAD:
            position += left
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        start, position = position + _PART_HEAD, position + _PART_HEAD + size
        if position > len(data):
            return
        # 1: whole, 2: first, 3: middle, 4: last part.
        record = data[start:position] if kind in (1, 2) else record + data[start:position]
        if kind in (1, 4):
            yield record


class _Mlflow:
    """MLflow. Without MLFLOW_TRACKING_URI the run stays in a database in run.dir."""

    def __init__(self, recipe: Recipe, identifier: str) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        folder = Path(recipe.run.dir).resolve()
        self._metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI")
        database = folder / "mlflow.db"
        if not address and not database.exists():
            # A kill among its hundred commands would leave a database that cannot be opened.
            part = folder / "mlflow.db.part"
            part.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{part}").search_experiments()
            part.rename(database)
        self._client = MlflowClient(address or f"sqlite:///{database}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            local = None if address else (folder / "mlflow").as_uri()
            number = self._client.create_experiment(name, artifact_location=local)
        else:
            number = experiment.experiment_id
        # MLflow chooses ids itself; ours is a tag.
        found = self._client.search_runs([number], f"tags.megavl_run = '{identifier}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, run_name=folder.name, tags={"megavl_run": identifier}).info.run_id
        settings = [Param(key, str(value)[:_LONGEST]) for key, value in _flat(to_dict(recipe))]
        for first in range(0, len(settings), _AT_ONCE):
            self._client.log_batch(
                self._id, params=settings[first : first + _AT_ONCE], tags=[RunTag("dir", str(folder))]
            )

    def last_step(self, kind: str) -> int:
        return max((point.step for point in self._client.get_metric_history(self._id, f"{kind}/step")), default=-1)

    def log(self, kind: str, scalars: Mapping[str, float], *, step: int) -> None:
        now, values = (
            int(time.time() * 1000),
            {**{_name(key): value for key, value in scalars.items()}, f"{kind}/step": step},
        )
        self._client.log_batch(self._id, [self._metric(key, float(value), now, step) for key, value in values.items()])

    def picture(self, kind: str, path: Path, *, step: int) -> None:
        self._client.log_artifact(self._id, str(path), kind)
        self.log(kind, {}, step=step)

    def end(self, *, code: int) -> None:
        status = {0: "FINISHED", EXIT_PREEMPTED: "KILLED", EXIT_INTERRUPTED: "KILLED"}.get(code, "FAILED")
        self._client.set_terminated(self._id, status=status)


def _name(text: str) -> str:
    """A name that MLflow takes."""
    parts = (re.sub(r"[^\w. :-]", "_", part) for part in text.split("/"))
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


_LONGEST, _AT_ONCE = 500, 100
"""Characters of a setting, and settings of a call, that every version of MLflow takes."""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


SERVICES: dict[str, Callable[[Recipe, str], Service]] = {"wandb": _Wandb, "mlflow": _Mlflow}
"""By the names that `run.trackers` takes: the run of a recipe with an id, begun or continued."""
