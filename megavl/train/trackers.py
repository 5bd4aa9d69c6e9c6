"""Weights & Biases and MLflow: the rows of a run, sent by a thread of rank 0.

A service that fails or hangs costs rows, never a step. `tracker_NAME.json` of the run directory names the service's
run, which goes on after a restart. Each start asks the service which steps it has. Rows that an earlier start did not
send are read from its files, up to the step from which a start goes on; steps that run again are not sent twice.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from megavl.config.errors import UsageError, one_line
from megavl.config.load import to_dict
from megavl.config.recipe import Recipe
from megavl.config.run import RunConfig
from megavl.files.durable import replace_durably
from megavl.train.growing_file import free_for_file, warn
from megavl.train.tracker_services import SERVICES, Service

_WAITING = 10_000
"""Rows that wait for a service; a step has one or two."""
_PATIENCE_S, _SHORT_S = 60.0, 5.0
"""Longest wait for a service at the end of a run, and where the run was stopped or has failed."""
_LOSSES = ("model", "optimizer", "data", "training", "evaluation")
"""Sections of a recipe that determine what its rows say."""

Scalars = Callable[[dict[str, Any]], Mapping[str, float]]
Rows = Mapping[str, tuple[Path, Scalars]]
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
        """Wait for the services, for a bounded time.

        Args:
            code: with which the run ends. After another than 0 the wait is short.
        """
        until = time.monotonic() + (min(_SHORT_S, self._patience_s) if code else self._patience_s)
        for sender in self._threads:
            sender.put("", 0, lambda service: service.end(code=code))
        answers = [sender.close(until) for sender in self._threads]
        if not all(answers):
            # Their libraries would wait on at the end of the interpreter.
            atexit.register(_leave_at_once, code)


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

    def close(self, until: float) -> bool:
        """Wait for what is queued, until a moment of `time.monotonic`; whether all was sent by then."""
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            warn(f"run.trackers: {self._name} does not answer; its last rows are lost, metrics.jsonl has them all")
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            identifier, changed = self._identifier()
            service = SERVICES[self._name](self._recipe, identifier)
            last: dict[str, int] = {}
            for kind, step, action in self._actions():
                if kind and kind not in last:
                    last[kind] = service.last_step(kind)
                    if changed and last[kind] > self._start_step:
                        self._warn_of_old_rows(kind, last[kind])
                if not kind or step > last[kind]:
                    action(service)
                    last[kind] = step
        except Exception as error:
            # Whatever a service's library raises.
            text = f"{type(error).__name__}: {one_line(error, limit=200)}"
            warn(f"run.trackers: {self._name}: {text}; training goes on without it, metrics.jsonl has all rows")
            while self._rows.get() is not None:
                continue

    def _warn_of_old_rows(self, kind: str, last: int) -> None:
        warn(
            f"run.trackers: {self._name} keeps the {kind} rows of steps {self._start_step + 1} to {last}, which other "
            "settings gave; metrics.jsonl has the new ones"
        )

    def _identifier(self) -> tuple[str, bool]:
        """Id of the service's run, and whether its settings have changed. A changed run from step 0 gets a new id."""
        settings = to_dict(self._recipe)
        whole = json.dumps([settings[name] for name in _LOSSES], sort_keys=True, default=str)
        digest = hashlib.sha256(whole.encode()).hexdigest()
        identifier, changed = uuid4().hex, False
        try:
            found = json.loads(self._notes.read_text())
            if re.fullmatch("[0-9a-f]{32}", found["id"]) and (self._start_step or found["recipe"] == digest):
                identifier, changed = found["id"], found["recipe"] != digest
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        free_for_file(self._notes)
        replace_durably(self._notes, json.dumps({"id": identifier, "recipe": digest}).encode())
        return identifier, changed

    def _actions(self) -> Iterator[_Action]:
        """Rows of earlier starts, then what is queued, until the end."""
        for kind, (path, scalars) in self._earlier.items():
            for step, found in _rows_until(path, self._start_step, scalars):
                yield kind, step, partial(_log, kind=kind, scalars=found, step=step)
        while (action := self._rows.get()) is not None:
            yield action


def _log(service: Service, *, kind: str, scalars: Mapping[str, float], step: int) -> None:
    service.log(kind, scalars, step=step)


def _rows_until(path: Path, step: int, scalars: Scalars) -> Iterator[tuple[int, Mapping[str, float]]]:
    """Steps and scalars of a file, without those of later steps, which run again, and without damaged lines."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
            found = int(row["step"]), scalars(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if found[0] <= step:
            yield found


def _leave_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def require_trackers(run: RunConfig) -> None:
    """Check that the libraries are there.

    Raises:
        UsageError: one is missing.
    """
    for name in run.trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"run.trackers: {name} is not installed; pip install 'megavl[{name}]', or leave it out")
