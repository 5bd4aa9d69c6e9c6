"""Runs of Weights & Biases and of MLflow, as `trackers.py` uses them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from megavl.config.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from megavl.config.load import to_dict
from megavl.config.recipe import Recipe
from megavl.foreign.printing import say
from megavl.train.tracker_notes import TrackerNotes
from megavl.train.wandb_files import WandbFiles

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

    def __init__(self, recipe: Recipe, notes: TrackerNotes) -> None:
        if not os.environ.get("WANDB_MODE"):
            # wandb refuses an empty one.
            os.environ.pop("WANDB_MODE", None)
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        # What its thread and its end may wait for; its button "Stop" would be taken for Ctrl-C.
        settings: dict[str, Any] = {"finish_timeout": _END_S, "stop_fn": lambda: None, "stop_on_fatal_error": False}
        if mode is None and not wandb.login(prompt=False):
            # It would ask for one on the terminal.
            say(f"run.trackers: wandb has no key; its run stays in {recipe.run.dir}/wandb, `wandb sync` uploads it")
            mode = "offline"
        self._local = WandbFiles(Path(recipe.run.dir), notes)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=_run_name(recipe),
            id=notes.identifier,
            resume="allow",
            dir=recipe.run.dir,
            mode=mode,
            config=to_dict(recipe),
            # The terminal stays ours.
            settings=wandb.Settings(console="off", silent=True, **settings),
        )
        if self._run.offline:
            self._local.begin(Path(self._run.dir).parent.name)
        # A row of its own for each call, so that no row waits for the next step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def last_step(self, kind: str) -> int:
        if self._run.offline:
            return self._local.last_step(kind, online=True)
        # A file of an online start has rows that a lost connection kept from the service; those are sent again.
        local = self._local.last_step(kind, online=False)
        if not self._run.resumed:
            return local
        known = dict(self._run.summary)
        if not known and self._run.starting_step:
            # The service did not say in time. No row is better than one twice.
            raise TimeoutError("it does not say which rows it has")
        return max(local, int(known.get(f"{kind}/step", -1)))

    def log(self, kind: str, scalars: Mapping[str, float], *, step: int) -> None:
        self._run.log({**scalars, "step": step, f"{kind}/step": step})
        if self._run.offline:
            self._local.wrote(kind, step)

    def picture(self, kind: str, path: Path, *, step: int) -> None:
        self._run.save(str(path), base_path=str(path.parent.parent), policy="now")
        self.log(kind, {}, step=step)

    def end(self, *, code: int) -> None:
        try:
            self._run.finish(exit_code=code)
        finally:
            self._local.note()


class _Mlflow:
    """MLflow. Without MLFLOW_TRACKING_URI the run stays in a database in run.dir."""

    def __init__(self, recipe: Recipe, notes: TrackerNotes) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        folder = Path(recipe.run.dir).resolve()
        self._metric = Metric
        address = os.environ.get("MLFLOW_TRACKING_URI")
        local = None if address else (folder / "mlflow").as_uri()
        self._client = MlflowClient(address or _local_database(folder, pictures=(folder / "mlflow").as_uri()))
        number = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT, pictures=local)
        # MLflow chooses ids itself; ours is a tag.
        found = self._client.search_runs([number], f"tags.megavl_run = '{notes.identifier}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"megavl_run": notes.identifier}
            self._id = self._client.create_run(number, run_name=_run_name(recipe), tags=tags).info.run_id
        # A kill may have left some out.
        known = found[0].data.params if found else {}
        settings = [Param(key, str(value)[:_LONGEST]) for key, value in _flat(to_dict(recipe)) if key not in known]
        for first in range(0, len(settings), _AT_ONCE):
            self._client.log_batch(
                self._id, params=settings[first : first + _AT_ONCE], tags=[RunTag("dir", str(folder))]
            )

    def _experiment(self, name: str, *, pictures: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=pictures))
            except Exception:
                # Another run may have made it meanwhile.
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

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


def _local_database(folder: Path, *, pictures: str) -> str:
    """Address of the database in run.dir, which is made if there is none.

    Args:
        pictures: where MLflow keeps pictures of the experiments that it makes there.
    """
    database = folder / "mlflow.db"
    if database.exists():
        _move_pictures(database, pictures)
    else:
        from mlflow.tracking import MlflowClient

        # A kill among its hundred commands would leave a database that cannot be opened.
        part = folder / "mlflow.db.part"
        part.unlink(missing_ok=True)
        MlflowClient(_sqlite(part)).search_experiments()
        part.rename(database)
    return _sqlite(database)


def _sqlite(path: Path) -> str:
    from sqlalchemy.engine import make_url

    # MLflow makes a folder of each address that has escapes.
    address = f"sqlite:///{path}"
    if make_url(address).database != str(path):
        raise ValueError(
            f"{path}: `?` and `%` followed by digits mean something else in the address of a database; "
            "rename run.dir, or set MLFLOW_TRACKING_URI"
        )
    return address


def _move_pictures(database: Path, pictures: str) -> None:
    """Where the run directory was moved, let MLflow find its pictures there: it has noted the old path."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        query = "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE 'file://%/mlflow'"
        for (old,) in connection.execute(query).fetchall():
            if old == pictures:
                continue
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (pictures, old)
            )
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
                (pictures, len(old) + 1, len(old) + 1, f"{old}/"),
            )


def _name(text: str) -> str:
    """A name that MLflow takes. One that had to change ends with a hash, so that no two become one."""
    parts = (re.sub(r"[^\w. :-]", "_", part) for part in text.split("/"))
    name = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if name == text and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


_LONGEST_NAME = 250
_LONGEST, _AT_ONCE = 500, 100
"""Characters of a setting, and settings of a call, that every version of MLflow takes."""


def _run_name(recipe: Recipe) -> str:
    """The last two folders of run.dir: the last alone is often that of a stage."""
    return "/".join([part for part in Path(recipe.run.dir).resolve().parts if part != "/"][-2:])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


SERVICES: dict[str, Callable[[Recipe, TrackerNotes], Service]] = {"wandb": _Wandb, "mlflow": _Mlflow}
"""By the names that `run.trackers` takes: the run of a recipe that its notes name, begun or continued."""
