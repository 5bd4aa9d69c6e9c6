"""The tasks of an ablation as SLURM job arrays, and one job that writes the report.

Tasks of one level of the graph make one array; each array waits for the one before. An array task runs the same command
with `--cell NUMBER`. What is done is not queued again, so the same command goes on after a failure; what still waits or
runs is not queued a second time. `slurm/JOB.json` in the cache says which tasks a job has.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from launch.ablations.graph import Task
from launch.bench.programs import ROOT
from megavl.config.errors import MegaVLError, UsageError
from megavl.files.durable import replace_durably, storage_errors
from megavl.foreign.parsing import read_json

LOGS = "slurm"
"""Folder in the cache for the output of the jobs, and for what each has."""
_OURS = ("--array", "--dependency", "--wrap", "--parsable", "--test-only")
_OURS_SHORT = ("-a", "-d")
"""Options that decide which tasks run, and when."""


def submit(
    tasks: Sequence[Task], done: Sequence[bool], *, command: Sequence[str], name: str, cache: Path, extra: str
) -> list[str]:
    """Queue what is not done.

    Args:
        tasks: all tasks of the graph in their order.
        done: whether each is.
        command: of `launch/ablate.py`, without `--slurm`.
        name: of the jobs.
        extra: further options of sbatch for all jobs, quoted as in a shell; they override ours that are not `_OURS`.

    Returns:
        Numbers of the jobs; the last one writes the report.

    Raises:
        UsageError: sbatch is missing or refuses, and then nothing stays queued; or some tasks are in the queue already.
        StorageError: the folder of the logs cannot be made.
    """
    options = _options(extra)
    logs = cache / LOGS
    with storage_errors(f"{logs}: making the folder of the jobs' output"):
        logs.mkdir(parents=True, exist_ok=True)
    _require_unqueued([task for task, is_done in zip(tasks, done) if not is_done], logs=logs)
    jobs: list[str] = []
    open_tasks = [(task.level, number) for number, (task, is_done) in enumerate(zip(tasks, done)) if not is_done]
    try:
        for _, found in groupby(open_tasks, key=lambda pair: pair[0]):
            numbers = [number for _, number in found]
            words = [f"--array={','.join(map(str, numbers))}", f"--output={logs}/%A_%a.txt", *options]
            cell = [*command, "--jobs", "1", "--cell", "$SLURM_ARRAY_TASK_ID"]
            jobs.append(_queue(words, cell, name=name, after=jobs[-1:]))
            with storage_errors(f"{logs}/{jobs[-1]}.json: writing it"):
                has = [tasks[number].address for number in numbers]
                replace_durably(logs / f"{jobs[-1]}.json", json.dumps(has).encode())
        words = [f"--output={logs}/%j.txt", *options]
        jobs.append(_queue(words, command, name=f"{name}-report", after=jobs[-1:]))
    except MegaVLError:
        # Half of the jobs would run without the other half.
        if jobs:
            subprocess.run(["scancel", *jobs], capture_output=True, check=False)
        raise
    return jobs


def _options(extra: str) -> list[str]:
    try:
        options = shlex.split(extra)
    except ValueError as error:
        raise UsageError(f"--sbatch {extra}: {error}; quote the options as in a shell") from error
    for before, word in zip(["--first=", *options], options):
        name = word.partition("=")[0]
        # sbatch takes `--arra=1` and `-a1` as well.
        ours = len(name) > len("--") and name.startswith("--") and any(one.startswith(name) for one in _OURS)
        if ours or word.startswith(_OURS_SHORT):
            raise UsageError(f"--sbatch {word}: is set for each job by this program; leave it out")
        if not word.startswith("-") and before.startswith("--") and "=" in before:
            raise UsageError(f"--sbatch {word}: belongs to no option, so sbatch would run it; leave it out")
    return options


def require_queued(task: Task, *, cache: Path) -> None:
    """Refuse to run another task than the one that this array job was queued for.

    Raises:
        UsageError: a file of the ablation was changed while the job waited.
    """
    queued = _tasks_of(cache / LOGS / f"{os.environ.get('SLURM_ARRAY_JOB_ID', '')}.json")
    if queued is not None and task.address not in queued:
        raise UsageError(
            f"--cell: {task.name} is not what this job was queued for, so a file of the ablation has changed; end the "
            "jobs with scancel, and start the same command again"
        )


def _tasks_of(path: Path) -> list[str] | None:
    """Addresses of the tasks of a job; None where no file says them."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    if not isinstance(found, list):
        raise UsageError(f"{path}: is damaged; remove it when none of the jobs waits or runs any more")
    return list(map(str, found))


def _require_unqueued(tasks: Sequence[Task], *, logs: Path) -> None:
    """Refuse tasks that wait or run in a job already."""
    held = {path.stem: set(_tasks_of(path) or ()) for path in logs.glob("*.json")}
    if not held:
        return
    try:
        shown = subprocess.run(["squeue", "--noheader", "--format=%F"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError("--slurm: there is no squeue here; run on a login node, or leave --slurm out") from None
    if shown.returncode:
        raise UsageError(f"--slurm: squeue failed: {' '.join(shown.stderr.split())}; start again when it answers")
    addresses = {task.address for task in tasks}
    jobs = sorted(job for job in set(shown.stdout.split()) & held.keys() if held[job] & addresses)
    if jobs:
        count = len(addresses & set().union(*(held[job] for job in jobs)))
        raise UsageError(
            f"--slurm: {count} of the tasks are in the queue already; wait for their jobs, or end them: scancel "
            f"{' '.join(jobs)}"
        )


def _queue(options: Sequence[str], command: Sequence[str], *, name: str, after: Sequence[str]) -> str:
    """Queue one script; returns its number."""
    waits = [f"--dependency=afterok:{job}" for job in after]
    shared = [f"--job-name={name}", f"--chdir={ROOT}", "--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes"]
    words = [word if word == "$SLURM_ARRAY_TASK_ID" else shlex.quote(word) for word in [sys.executable, *command]]
    script = f"#!/bin/bash\nexec {' '.join(words)}\n"
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *shared, *waits, *options],
            input=script,
            capture_output=True,
            text=True,
            env={key: value for key, value in os.environ.items() if not key.startswith("SLURM_ARRAY_")},
            check=False,
        )
    except FileNotFoundError:
        raise UsageError("--slurm: there is no sbatch here; run on a login node, or leave --slurm out") from None
    if done.returncode:
        raise UsageError(f"--slurm: sbatch refused: {' '.join(done.stderr.split())}; correct --sbatch")
    number = done.stdout.strip().partition(";")[0]
    if not number.isdecimal():
        raise UsageError(f"--slurm: sbatch gave no number of a job but {done.stdout[:200]!r}; correct --sbatch")
    return number
