"""Preprocessing as a SLURM job array: tasks make shards, and a job that waits for all of them makes the dataset.

Each task is the ordinary command with `--task I --num-tasks N`, so a task that is requeued or started by hand goes on
where it was, and nothing but shards and their manifests decides what is done.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavl.config.errors import StorageError, UsageError

_SCRIPT = Path(__file__).with_name("preprocess.py")
LOGS = "slurm"
"""Folder of the jobs' output, in the dataset's."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """Numbers of the two jobs."""

    array: str
    merge: str


def submit(arguments: Sequence[str], *, output: str, tasks: int, workers: int, extra: str) -> Submitted:
    """Queue the array and the job that waits for it.

    Args:
        arguments: of the command, without the program's name.
        output: folder of the dataset.
        tasks: of the array.
        workers: processes of a task, each on a core of its own.
        extra: further options of sbatch, as in a shell.

    Raises:
        UsageError: sbatch is missing or refuses.
        StorageError: the folder of the logs cannot be made.
    """
    logs = Path(os.path.abspath(output)) / LOGS
    try:
        options = shlex.split(extra)
    except ValueError as error:
        raise UsageError(f"--sbatch {extra}: {error}; quote the options as in a shell") from error
    try:
        logs.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"{logs}: cannot write ({error.strerror}); choose another --output") from error
    command = [sys.executable, str(_SCRIPT), *arguments, "--engine", "local", "--resume"]
    task = [*command, "--workers", str(workers), "--num-tasks", str(tasks), "--no-finish", "--task"]
    shared = ["--parsable", "--chdir", os.getcwd(), "--requeue", "--open-mode=append", *options]
    array = _sbatch(
        *(*shared, "--job-name=preprocess", f"--array=0-{tasks - 1}", f"--cpus-per-task={workers}"),
        *(f"--output={logs}/%A_%a.out", "--wrap", f'exec {shlex.join(task)} "$SLURM_ARRAY_TASK_ID"'),
    )
    merge = [*command, "--workers", "1", "--num-tasks", "1", "--task", "0"]
    try:
        last = _sbatch(
            *(*shared, "--job-name=preprocess-merge", "--cpus-per-task=1"),
            *(f"--dependency=afterok:{array}", "--kill-on-invalid-dep=yes"),
            *(f"--output={logs}/%j.out", "--wrap", f"exec {shlex.join(merge)}"),
        )
    except UsageError as error:
        raise UsageError(f"{error}; job {array} was queued already, and the same command merges its shards") from error
    return Submitted(array=array, merge=last)


def _sbatch(*options: str) -> str:
    try:
        done = subprocess.run(["sbatch", *options], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(
            f"--engine slurm: cannot start sbatch ({error.strerror}); run this on a login node, or use --engine local"
        ) from error
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"code {done.returncode}"
        raise UsageError(f"--engine slurm: sbatch refused ({message}); correct --sbatch or --num-tasks")
    # With several clusters it prints NUMBER;CLUSTER.
    return done.stdout.strip().partition(";")[0]
