"""The tasks of an ablation as SLURM job arrays, and one job that writes the report.

Tasks of one level of the graph make one array; each array waits for the one before. An array task runs the same command
with `--cell NUMBER`. What is done is not queued again, so the same command goes on after a failure.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from launch.ablations.graph import Task
from launch.bench.programs import ROOT
from megavl.config.errors import UsageError
from megavl.files.durable import storage_errors

LOGS = "slurm"
"""Folder in the cache for the output of the jobs."""


def submit(
    tasks: Sequence[Task], done: Sequence[bool], *, command: Sequence[str], name: str, cache: Path, extra: str
) -> list[str]:
    """Queue what is not done.

    Args:
        tasks: all tasks of the graph in their order.
        done: whether each is.
        command: of `launch/ablate.py`, without `--slurm`.
        name: of the jobs.
        extra: further options of sbatch for the arrays, quoted as in a shell; they override ours.

    Returns:
        Numbers of the jobs; the last one writes the report.

    Raises:
        UsageError: sbatch is missing or refuses.
        StorageError: the folder of the logs cannot be made.
    """
    try:
        options = shlex.split(extra)
    except ValueError as error:
        raise UsageError(f"--sbatch {extra}: {error}; quote the options as in a shell") from error
    logs = cache / LOGS
    with storage_errors(f"{logs}: making the folder of the jobs' output"):
        logs.mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    open_tasks = [(task.level, number) for number, (task, is_done) in enumerate(zip(tasks, done)) if not is_done]
    for _, found in groupby(open_tasks, key=lambda pair: pair[0]):
        numbers = ",".join(str(number) for _, number in found)
        words = [f"--array={numbers}", f"--output={logs}/%A_%a.txt", *options]
        jobs.append(
            _queue(words, [*command, "--jobs", "1", "--cell", "$SLURM_ARRAY_TASK_ID"], name=name, after=jobs[-1:])
        )
    jobs.append(_queue([f"--output={logs}/%j.txt"], command, name=f"{name}-report", after=jobs[-1:]))
    return jobs


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
    return done.stdout.strip().partition(";")[0]
