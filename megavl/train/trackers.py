"""Weights & Biases and MLflow: the rows of a run, sent by a thread of rank 0.

A service that fails or hangs costs rows, never a step. `tracker_NAME.json` of the run directory names the service's
run, which goes on after a restart. Each start asks the service which steps it has. Rows that an earlier start did not
send are read from its files, and steps that run again are not sent twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from megavl.config.errors import UsageError, one_line
from megavl.config.load import dump_recipe, to_dict
from megavl.config.recipe import Recipe
from megavl.config.run import RunConfig
from megavl.files.durable import replace_durably
from megavl.foreign.printing import say
from megavl.train.growing_file import free_for_file, warn

_WAITING = 10_000
"""Rows that wait for a service; a step has one or two."""
_PATIENCE_S = 60.0
"""Longest wait for a service at the end of a run."""
_PROJECT = "megavl"


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


Rows = Mapping[str, tuple[Path, Callable[[dict[str, Any]], Mapping[str, float]]]]
"""Kinds of rows: the file of each, and what its scalars are."""


class Trackers:
    """All services of a run."""

    def __init__(self, recipe: Recipe, *, start_step: int, rows: Rows) -> None:
        """Begin, or go on. Nothing is imported, read or sent by the calling thread.

        Args:
            start_step: steps done. At 0, a recipe with other settings begins another run at each service.
            rows: what earlier starts of this run have written.
        """
        folder = Path(recipe.run.dir)
        # Sooner than the watchdogs of the ranks that wait for this one.
        self._patience_s = min(_PATIENCE_S, recipe.parallel.timeout_s / 2)
        self._threads = [
            _Sender(name, folder / f"tracker_{name}.json", recipe=recipe, start_step=start_step, rows=rows)
            for name in dict.fromkeys(recipe.run.trackers)
        ]

    def write(self, scalars: Mapping[str, float], *, step: int, kind: str) -> None:
        """Send scalars of a step, unless they were sent before.

        Args:
            kind: of the row, such as `train`; of each kind there is one row a step.
        """
        for sender in self._threads:
            sender.put(kind, step, partial(_log, kind=kind, scalars=scalars, step=step))

    def picture(self, path: Path, *, step: int) -> None:
        """Send a picture of a step."""
        for sender in self._threads:
            sender.put(path.parent.name, step, lambda service: service.picture(path.parent.name, path, step=step))

    def close(self, *, code: int) -> None:
        """Wait for the services, for a bounded time."""
        until = time.monotonic() + self._patience_s
        for sender in self._threads:
            sender.put("", 0, lambda service: service.end(code=code))
        for sender in self._threads:
            sender.close(until)


_Action = tuple[str, int, Callable[[Service], None]]


class _Sender:
    """One service and its thread."""

    def __init__(self, name: str, notes: Path, *, recipe: Recipe, start_step: int, rows: Rows) -> None:
        self._name, self._notes, self._recipe, self._start_step, self._earlier = name, notes, recipe, start_step, rows
        self._rows: queue.Queue[_Action | None] = queue.Queue(_WAITING)
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name=f"megavl-{name}", daemon=True)
        self._thread.start()

    def put(self, kind: str, step: int, action: Callable[[Service], None]) -> None:
        """Queue an action; drop it where too many wait."""
        try:
            self._rows.put_nowait((kind, step, action))
        except queue.Full:
            self._lost += 1
            if self._lost == 1:
                warn(f"run.trackers: {self._name} is too slow; some rows are not sent, metrics.jsonl has them all")

    def close(self, until: float) -> None:
        """Wait for what is queued, until a moment of `time.monotonic`."""
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            warn(f"run.trackers: {self._name} does not answer; its last rows are lost, metrics.jsonl has them all")

    def _run(self) -> None:
        try:
            service = _SERVICES[self._name](self._recipe, self._identifier())
            last: dict[str, int] = {}
            for kind, step, action in self._actions():
                if kind and kind not in last:
                    last[kind] = service.last_step(kind)
                if not kind or step > last[kind]:
                    action(service)
                    last[kind] = step
        except Exception as error:
            # Whatever a service's library raises.
            text = f"{type(error).__name__}: {one_line(error, limit=200)}"
            warn(f"run.trackers: {self._name}: {text}; training goes on without it, metrics.jsonl has all rows")
            while self._rows.get() is not None:
                continue

    def _identifier(self) -> str:
        """Id of the service's run: the noted one, unless a run with other settings starts from its beginning."""
        digest = hashlib.sha256(dump_recipe(self._recipe).encode()).hexdigest()
        try:
            found = json.loads(self._notes.read_text())
            if isinstance(found["id"], str) and (self._start_step or found["recipe"] == digest):
                return found["id"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        identifier = uuid4().hex
        free_for_file(self._notes)
        replace_durably(self._notes, json.dumps({"id": identifier, "recipe": digest}).encode())
        return identifier

    def _actions(self) -> Iterator[_Action]:
        """Rows of earlier starts, then what is queued, until the end."""
        for kind, (path, scalars) in self._earlier.items():
            for row in _rows_until(path, self._start_step):
                yield kind, row["step"], partial(_log, kind=kind, scalars=scalars(row), step=row["step"])
        while (action := self._rows.get()) is not None:
            yield action


def _log(service: Service, *, kind: str, scalars: Mapping[str, float], step: int) -> None:
    service.log(kind, scalars, step=step)


def _rows_until(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """Rows of a file, without those of later steps, which run again, and without damaged lines."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            yield row


def require_trackers(run: RunConfig) -> None:
    """Check that the libraries are there.

    Raises:
        UsageError: one is missing.
    """
    for name in run.trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"run.trackers: {name} is not installed; pip install 'megavl[{name}]', or leave it out")


class _Wandb:
    """Weights & Biases. Without a key the run stays in run.dir, for `wandb sync`."""

    def __init__(self, recipe: Recipe, identifier: str) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.login(prompt=False):
            # It would ask for one on the terminal.
            say(f"run.trackers: wandb has no key; its run stays in {recipe.run.dir}/wandb, `wandb sync` uploads it")
            mode = "offline"
        self._wandb, self._offline = wandb, mode == "offline"
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
            settings=wandb.Settings(console="off", silent=True),
        )
        # A row of its own for each call, so that no row waits for the next step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def last_step(self, kind: str) -> int:
        if self._offline:
            return max((step for path in self._files for step in _steps_in(path, f"{kind}/step")), default=-1)
        return int(self._run.summary.get(f"{kind}/step", -1))

    def log(self, kind: str, scalars: Mapping[str, float], *, step: int) -> None:
        self._run.log({**scalars, "step": step, f"{kind}/step": step})

    def picture(self, kind: str, path: Path, *, step: int) -> None:
        self._run.log({kind: self._wandb.Html(path.read_text()), "step": step, f"{kind}/step": step})

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
        now, values = int(time.time() * 1000), {**scalars, f"{kind}/step": step}
        self._client.log_batch(self._id, [self._metric(key, float(value), now, step) for key, value in values.items()])

    def picture(self, kind: str, path: Path, *, step: int) -> None:
        self._client.log_artifact(self._id, str(path), kind)
        self.log(kind, {}, step=step)

    def end(self, *, code: int) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if code == 0 else "KILLED")


_LONGEST, _AT_ONCE = 500, 100
"""Characters of a setting, and settings of a call, that every version of MLflow takes."""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


_SERVICES: dict[str, Callable[[Recipe, str], Service]] = {"wandb": _Wandb, "mlflow": _Mlflow}
