"""Weights & Biases and MLflow: the rows of a run, sent by a thread of rank 0.

A service that fails or hangs costs rows, never a step. `tracker_NAME.json` of the run directory names the service's
run, which goes on after a restart. Each start asks the service which steps it has. Rows that an earlier start did not
send are read from its files, up to the step from which a start goes on; steps that run again are not sent twice.
A run directory that was moved goes on in its run; a copy of one begins another.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from megavl.config.errors import UsageError, one_line
from megavl.config.load import to_dict
from megavl.config.recipe import Recipe
from megavl.config.run import RunConfig
from megavl.train.growing_file import warn
from megavl.train.tracker_notes import TrackerNotes
from megavl.train.tracker_services import SERVICES, Service

_WAITING = 10_000
"""Rows that wait for a service; a step has one or two."""
_PATIENCE_S, _SHORT_S, _LAST_S = 60.0, 5.0, 5.0
"""Longest wait for a service at the end of a run, and where the run was stopped or has failed; the part of it in which
no row is sent any more."""
_LOSSES = ("model", "optimizer", "data", "training", "evaluation")
"""Sections of a recipe that determine what its rows say, beside `checkpoint.init` and the data."""

_THREAD = "megavl-tracker-"
_EXTRAS = {"tensorboard": "board"}
"""Extras of setup.py that are not called as the library."""

Scalars = Callable[[dict[str, Any]], Mapping[str, float]]
Rows = Mapping[str, tuple[Path, Scalars]]
"""Kinds of rows: the file of each, and what its scalars are."""


class Trackers:
    """All services of a run."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        start_step: int,
        rows: Rows,
        pictures: Sequence[tuple[int, Path]] = (),
        fingerprint: str = "",
    ) -> None:
        """Begin, or go on. Nothing is imported, read or sent by the calling thread.

        Args:
            start_step: steps done. At 0, other settings, start weights or data begin another run at each service.
            rows: what earlier starts of this run have written.
            pictures: steps and files of pictures that they may have drawn, in the order of steps.
            fingerprint: of the data.
        """
        folder = Path(recipe.run.dir)
        # Sooner than the watchdogs of the ranks that wait for this one.
        self._patience_s = min(_PATIENCE_S, recipe.parallel.timeout_s / 2)
        earlier = partial(_earlier, rows=rows, pictures=pictures, step=start_step)
        digest = _digest(recipe, fingerprint)
        self._senders = [
            _Sender(name, folder, recipe=recipe, digest=digest, start_step=start_step, earlier=earlier)
            for name in dict.fromkeys(recipe.run.trackers)
            if name in SERVICES
        ]

    def write(self, scalars: Mapping[str, float], *, step: int, kind: str) -> None:
        """Send scalars of a step, unless they were sent before.

        Args:
            kind: of the row, such as `train`; of each kind there is one row a step.
        """
        for sender in self._senders:
            sender.put(_Row(kind, step, scalars))

    def picture(self, path: Path, *, step: int) -> None:
        """Send a picture of a step."""
        for sender in self._senders:
            sender.put(_Row(path.parent.name, step, path))

    def close(self, *, code: int) -> None:
        """Wait for the services, for a bounded time.

        Args:
            code: with which the run ends. After another than 0 the wait is short.
        """
        until = time.monotonic() + (min(_SHORT_S, self._patience_s) if code else self._patience_s)
        for sender in self._senders:
            sender.end(code=code, until=until)
        for sender in self._senders:
            sender.wait(until)


class _Row(NamedTuple):
    kind: str
    step: int
    content: Mapping[str, float] | Path
    """Scalars, or a picture."""


class _Sender:
    """One service and its thread."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        recipe: Recipe,
        digest: str,
        start_step: int,
        earlier: Callable[[], Iterator[_Row]],
    ) -> None:
        self._name, self._folder, self._recipe, self._digest = name, folder, recipe, digest
        self._start_step, self._earlier = start_step, earlier
        self._rows: queue.Queue[_Row | None] = queue.Queue(_WAITING)
        self._lost, self._picture_failed = 0, False
        # The end is no row: it finds a place where the queue is full.
        self._ending, self._code, self._rows_until = threading.Event(), 0, math.inf
        self._thread = threading.Thread(target=self._run, name=f"{_THREAD}{name}", daemon=True)
        self._thread.start()

    def put(self, row: _Row) -> None:
        """Queue a row; drop it where too many wait."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._lost += 1
            if self._lost == 1:
                self._warn("is too slow; some rows are not sent, metrics.jsonl has them all")

    def end(self, *, code: int, until: float) -> None:
        """Let the service end its run, shortly before a moment of `time.monotonic` where many rows wait."""
        self._code, self._rows_until = code, until - min(_LAST_S, (until - time.monotonic()) / 4)
        self._ending.set()
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)

    def wait(self, until: float) -> None:
        """Wait for the end until then."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._warn("does not answer; metrics.jsonl has the rows that it lacks, and another start sends them")

    def _run(self) -> None:
        try:
            self._send_all()
        except BaseException as error:
            # Whatever a service's library raises, `SystemExit` too: the thread would end without a word.
            text = f"{type(error).__name__}: {one_line(error, limit=200)}"
            warn(f"run.trackers: {self._name}: {text}; training goes on without it, metrics.jsonl has all rows")
            for _ in self._queued():
                continue

    def _send_all(self) -> None:
        notes, changed = self._begun()
        service = SERVICES[self._name](self._recipe, notes)
        last: dict[str, int] = {}
        for kind, step, content in itertools.chain(self._earlier(), self._queued()):
            if time.monotonic() > self._rows_until:
                self._warn("is too slow; metrics.jsonl has the last rows, and another start sends them")
                break
            if kind not in last:
                last[kind] = service.last_step(kind)
                if last[kind] > self._start_step and (changed or not self._start_step):
                    self._warn_of_old_rows(kind, last[kind], changed=changed)
            if step <= last[kind]:
                continue
            if isinstance(content, Path):
                self._send_picture(service, kind, content, step=step)
            else:
                service.log(kind, content, step=step)
            last[kind] = step
        service.end(code=self._code)

    def _send_picture(self, service: Service, kind: str, path: Path, *, step: int) -> None:
        try:
            service.picture(kind, path, step=step)
        except Exception as error:
            # Rows may well go on: pictures have a storage and a library of their own.
            if not self._picture_failed:
                self._warn(f"does not take {path} ({type(error).__name__}: {one_line(error, limit=200)}); rows go on")
            self._picture_failed = True

    def _warn(self, text: str) -> None:
        warn(f"run.trackers: {self._name} {text}")

    def _warn_of_old_rows(self, kind: str, last: int, *, changed: bool) -> None:
        origin = "other settings" if changed else "an earlier start"
        self._warn(
            f"keeps the {kind} rows of steps {self._start_step + 1} to {last}, which {origin} gave; metrics.jsonl has "
            "the new ones"
        )

    def _begun(self) -> tuple[TrackerNotes, bool]:
        """Notes of the service's run, and whether its settings have changed. A changed run from step 0 is another."""
        notes = TrackerNotes(self._folder / f"tracker_{self._name}.json")
        changed = notes.recipe != self._digest
        origin = notes.copied_from()
        if origin is not None:
            warn(
                f"run.trackers: {self._name}: {self._folder} is a copy of {origin}; it gets a run of its own, with the "
                f"rows up to step {self._start_step}"
            )
        goes_on = notes.identifier and origin is None and (self._start_step or not changed)
        notes.begin(identifier=notes.identifier if goes_on else uuid4().hex, recipe=self._digest)
        return notes, bool(goes_on and changed)

    def _queued(self) -> Iterator[_Row]:
        while not (self._ending.is_set() and self._rows.empty()):
            row = self._rows.get()
            if row is not None:
                yield row


def _digest(recipe: Recipe, fingerprint: str) -> str:
    settings = to_dict(recipe)
    losses = [*(settings[name] for name in _LOSSES), settings["checkpoint"]["init"], fingerprint]
    return hashlib.sha256(json.dumps(losses, sort_keys=True, default=str).encode()).hexdigest()


def _earlier(*, rows: Rows, pictures: Sequence[tuple[int, Path]], step: int) -> Iterator[_Row]:
    """Rows and pictures of earlier starts, without those of steps that run again."""
    for kind, (path, scalars) in rows.items():
        for found, content in _rows_until(path, step, scalars):
            yield _Row(kind, found, content)
    for drawn, path in pictures:
        if drawn <= step and path.is_file():
            yield _Row(path.parent.name, drawn, path)


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


def leave_past_services(code: int) -> None:
    """End this process at once if a service still does not answer: its library would wait on for it."""
    if any(thread.name.startswith(_THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def require_trackers(run: RunConfig) -> None:
    """Check that the libraries are there.

    Raises:
        UsageError: one is missing.
    """
    for name in run.trackers:
        found = importlib.util.find_spec(name)
        # A folder of that name in the working directory, such as W&B's own, has no origin.
        if found is None or found.origin is None:
            extra = _EXTRAS.get(name, name)
            raise UsageError(f"run.trackers: {name} is not installed; pip install 'megavl[{extra}]', or leave it out")
