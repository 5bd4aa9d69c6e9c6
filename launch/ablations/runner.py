"""Runs the tasks of a graph, several at a time, each in a folder of its own.

All state is in files: a task is done when its folder holds `done.json`. So a runner may be killed at any moment, and
the next one goes on. Several runners may share a cache; a folder belongs to one of them at a time.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.ablations.engine import Engine
from launch.ablations.graph import Task, files, program
from launch.ablations.records import DONE, EVALUATION, METRICS, SPENT, commit, facts, is_done, read_rows, read_spent
from megavl.config.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, DataError, PeerError, UsageError
from megavl.config.recipe import Recipe
from megavl.files.durable import replace_durably, storage_errors
from megavl.files.owner import Owner
from megavl.files.ownership import Ownership, current_owner, take
from megavl.foreign.printing import say, visible

LOG = "log.txt"
SCRIPTS = {1: "warmup", 2: "pretrain", 3: "sft"}
"""Launch script of each stage."""
_OF_THE_TASK = ("RECIPE", "TP", "PP", "DATA", "TOKENIZER", "INIT", "RUN_DIR", "EXTRA", "DRY_RUN")
"""Settings of a launch script that the recipe has decided; those of the caller are about other runs."""
_TICK_S, _BUSY_S, _REPORT_S = 0.1, 2.0, 60.0
_MINUTE = 60


class TaskFailed(Exception):
    """Some task ended badly; `code` is the exit code for this."""

    def __init__(self, text: str, *, code: int) -> None:
        super().__init__(text)
        self.code = code


class Stopped(Exception):
    """A signal stopped the runner, and all programs have ended; `code` is the exit code for this."""

    def __init__(self, code: int) -> None:
        super().__init__("stopped; the same command goes on")
        self.code = code

    @classmethod
    def by(cls, number: int) -> Stopped:
        """After this signal."""
        return cls(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)


@dataclass
class Running:
    """A task under way."""

    task: Task
    held: Ownership
    began: float
    before: float
    """Seconds of earlier starts."""
    commits: list[str]
    """Of the code of all starts."""
    conditions: list[list[Any]]
    """Machine and runs at a time of all starts."""

    def spent(self) -> dict[str, Any]:
        """Of all starts until now."""
        seconds = round(self.before + time.monotonic() - self.began, 3)
        return {"seconds": seconds, "commits": self.commits, "conditions": self.conditions}


@dataclass
class Runner:
    """Runs tasks and everything that they need."""

    tasks: Sequence[Task]
    """Inputs before the tasks that need them."""
    cache: Path
    jobs: int
    launcher: str | None = None
    title: str = ""
    """For messages."""
    signals: list[int] = field(default_factory=list)
    """Signals that have arrived; a handler appends."""

    def run(self) -> None:
        """Run all tasks that are not done.

        Raises:
            TaskFailed: a task ended badly; others that do not need it were run.
            Stopped: a signal arrived.
        """
        self._engine = Engine()
        # Programs are forked from a process that has most of the code imported from now on.
        self._commit = commit()
        self._running: dict[str, Running] = {}
        self._failures: dict[str, TaskFailed] = {}
        self._busy: dict[str, float] = {}
        self._done = {task.address for task in self.tasks if is_done(task, cache=self.cache)}
        self._clock = _Clock(self.tasks, cache=self.cache, done=self._done)
        try:
            while self._step():
                time.sleep(_TICK_S)
        finally:
            # A folder is free when its program is gone.
            self._engine.close()
            for one in self._running.values():
                one.held.release()
        if self._failures:
            raise next(iter(self._failures.values()))

    def _step(self) -> bool:
        """Look at what ended and start what can start; returns whether there is more to wait for."""
        self._collect()
        if self.signals:
            self._stop()
        for task in self.tasks:
            if len(self._running) >= self.jobs:
                break
            if self._waits(task) and all(one.address in self._done for one in task.inputs):
                self._start(task)
        if self._clock.due():
            self._tell(f"{len(self._running)} running")
            for one in self._running.values():
                self._note(one)
        return bool(self._running) or any(self._waits(task) for task in self.tasks)

    def _waits(self, task: Task) -> bool:
        """Whether a task is neither done nor under way, and nothing that it needs has failed."""
        if task.address in self._done or task.address in self._running or task.address in self._failures:
            return False
        return not self._is_lost(task)

    def _is_lost(self, task: Task) -> bool:
        """Whether it or something that it needs has failed."""
        return bool(self._failures) and self._has_failed(task)

    def _has_failed(self, task: Task) -> bool:
        return task.address in self._failures or any(self._has_failed(one) for one in task.inputs)

    def _start(self, task: Task) -> None:
        if time.monotonic() < self._busy.get(task.address, 0.0):
            return
        folder = self.cache / task.address
        try:
            held = take(folder, Owner.this_process(), name="--cache", say=lambda _: None)
        except UsageError:
            self._wait_for_other(task)
            return
        if is_done(task, cache=self.cache):
            held.release()
            self._done.add(task.address)
            return
        if _is_owned(folder / "run"):
            # The ranks of a runner that was killed still save.
            held.release()
            self._wait_for_other(task)
            return
        with storage_errors(f"{folder}: preparing {task.name}"):
            for name, content in files(task, cache=self.cache).items():
                replace_durably(folder / name, content)
        # First noted, so that it is released however the launch ends.
        spent = read_spent(folder)
        self._running[task.address] = Running(
            task,
            held,
            began=time.monotonic(),
            before=spent["seconds"],
            commits=_with(spent["commits"], self._commit),
            conditions=_with(spent["conditions"], [platform.node(), self.jobs]),
        )
        self._launch(task, log=folder / LOG)

    def _note(self, one: Running) -> None:
        """Keep how long it has taken, for the next start."""
        folder = self.cache / one.task.address
        with storage_errors(f"{folder}: writing {SPENT}"):
            replace_durably(folder / SPENT, json.dumps(one.spent()).encode())

    def _wait_for_other(self, task: Task) -> None:
        """Another runner makes it, or did so while this one looked."""
        if task.address not in self._busy:
            say(f"{self.title}: {task.name}: another process makes it; waiting")
        self._busy[task.address] = time.monotonic() + _BUSY_S
        if is_done(task, cache=self.cache):
            self._done.add(task.address)

    def _launch(self, task: Task, *, log: Path) -> None:
        module, words = program(task, cache=self.cache)
        if self.launcher is None or task.recipe is None:
            self._engine.start(task.address, module, words, log=log)
            return
        command = ["bash", f"launch/{SCRIPTS[task.recipe.training.stage]}_{self.launcher}.sh"]
        self._engine.run(task.address, command, log=log, environment=launcher_environment(words[-1]))

    def _collect(self) -> None:
        for address, code in self._engine.ended().items():
            self._finish(self._running.pop(address), code)

    def _finish(self, one: Running, code: int) -> None:
        folder = self.cache / one.task.address
        try:
            one.held.confirm()
        except UsageError:
            # This process stood still, and another one makes the task now.
            one.held.release()
            self._wait_for_other(one.task)
            return
        reason = None
        if code == 0 and one.task.recipe is not None:
            try:
                code = _code_of_run(folder, one.task.recipe)
            except DataError as error:
                code, reason = error.exit_code, str(error)
        if code == 0:
            with storage_errors(f"{folder}: writing {DONE}"):
                # Others start from the newest checkpoint, and one takes three times the size of the model.
                for older in sorted(folder.glob("run/checkpoints/iter_*[0-9]"))[:-1]:
                    shutil.rmtree(older)
                # The rest of the code was imported since, so a commit in between is named as well.
                one.commits = _with(one.commits, commit())
                content = {"name": one.task.name, **one.spent(), **facts(folder)}
                replace_durably(folder / DONE, json.dumps(content, indent=1).encode() + b"\n")
            self._done.add(one.task.address)
            self._tell(f"{one.task.name} done")
        elif not self.signals:
            number = code if code > 0 else PeerError.exit_code
            log = folder / LOG
            text = f"{one.task.name} ended with code {code}: {reason or _reason(log)}; all of its output is in {log}"
            self._failures[one.task.address] = TaskFailed(text, code=number)
            say(f"{self.title}: {text}", to_errors=True)
        # Also after a success, for a start after `done.json` was damaged.
        self._note(one)
        one.held.release()

    def _stop(self) -> None:
        """Pass signals on until every program has ended."""
        passed = 0
        while self._running:
            for number in self.signals[passed:]:
                # A second Ctrl-C ends everything at once.
                again = number == signal.SIGINT and signal.SIGINT in self.signals[:passed]
                number = signal.SIGKILL if again else number
                self._engine.signal(number)
                passed += 1
            time.sleep(_TICK_S)
            self._collect()
        raise Stopped.by(self.signals[0])

    def _tell(self, what: str) -> None:
        say(f"{self.title}: {what}; {self._clock.describe(self._done, self._running)}")


def _with(found: list[Any], last: Any) -> list[Any]:
    return found if last in found else [*found, last]


class _Clock:
    """How far the work is, how fast it goes, and what is left."""

    def __init__(self, tasks: Sequence[Task], *, cache: Path, done: set[str]) -> None:
        self._tasks, self._cache = tasks, cache
        self._began = self._told = time.monotonic()
        self._before = self._steps(done, {task.address: task for task in tasks})

    def due(self) -> bool:
        """Whether it is time to say something."""
        if time.monotonic() < self._told + _REPORT_S:
            return False
        self._told = time.monotonic()
        return True

    def describe(self, done: set[str], running: dict[str, Running]) -> str:
        """Tasks, steps, rate and time left."""
        steps, total = self._steps(done, running), sum(task.steps for task in self._tasks)
        rate = (steps - self._before) / max(1e-9, time.monotonic() - self._began)
        left = f", {rate:.1f} steps/s, {(total - steps) / rate / _MINUTE:.0f} min left" if rate > 0 else ""
        return f"{len(done)} of {len(self._tasks)} tasks, {steps:,} of {total:,} steps{left}"

    def _steps(self, done: set[str], others: Any) -> int:
        whole = sum(task.steps for task in self._tasks if task.address in done)
        parts = (_lines(self._cache / address / "run" / METRICS) for address in others if address not in done)
        return whole + sum(parts)


def launcher_environment(recipe: str) -> dict[str, str]:
    """Variables of a launch script that runs this recipe."""
    return {**{key: value for key, value in os.environ.items() if key not in _OF_THE_TASK}, "RECIPE": recipe}


def _code_of_run(folder: Path, recipe: Recipe) -> int:
    """0 where the run says that it has finished, and its logs end at its last step.

    A launch script also ends well where it only submitted a job, and a run where its last evaluation failed.
    """
    try:
        status = json.loads((folder / "run/exit_status.json").read_text(encoding="utf-8"))
        finished = bool(status["code"] == 0)
    except (OSError, ValueError, KeyError, TypeError):
        finished = False
    if not finished:
        return PeerError.exit_code
    logs = [METRICS, *([EVALUATION] if recipe.evaluation.interval else [])]
    ends = [rows[-1]["step"] if (rows := read_rows(folder / "run" / name)) else 0 for name in logs]
    return 0 if all(end == recipe.training.steps for end in ends) else DataError.exit_code


def _reason(log: Path) -> str:
    """The last error in a log, or its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line for line in lines if line.startswith(("error:", "warning: no evaluation"))]
    last = (errors or [line for line in lines if line.strip()] or ["no output"])[-1]
    return visible(last.removeprefix("error: "), keep="")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _is_owned(run: Path) -> bool:
    """Whether a process of this machine still works in the directory of a run."""
    owner = current_owner(run)
    return owner is not None and owner.process.is_alive() is True
