"""Preprocessing as a SLURM job array through datatrove: array tasks make shards, then one job makes the dataset.

datatrove queues the array, divides it where it is too long, numbers the array tasks, keeps their logs and requeues them
on a signal. An array task runs the command that queued it, with the folder of its job in an environment variable. The
manifests of the shards say which are done; datatrove's own marks are not read. Nothing is unpickled: the pickle that
datatrove writes for its own tasks is removed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.utils.logging import get_random_str, get_timestamp, logger

from megavl.config.errors import MegaVLError, StorageError, UsageError
from megavl.foreign.printing import say_error

LOGS = "slurm"
"""Folder inside the dataset for the output of the jobs."""
JOB_FOLDER = "MEGAVL_PREPROCESS_JOB"
"""Environment variable that the job scripts set to the folder of their job."""
SHARDS, MERGE = "shards", "merge"
"""The two jobs, and the names of their folders."""
_SCRIPT = Path(__file__).parents[1] / "preprocess.py"


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """Numbers of the two jobs."""

    array: str | None
    """The last array; None when all shards were done already."""
    merge: str
    folder: Path
    """Output of the jobs."""


class _Jobs(SlurmPipelineExecutor):  # type: ignore[misc]
    """datatrove's job array with our script and quoted paths, and without its own record of finished tasks."""

    def __init__(self, folder: Path, *, tasks: int, todo: Sequence[int] = (), script: str = "", **more: Any) -> None:
        super().__init__(
            **{"pipeline": [], **more},
            tasks=tasks,
            time="",
            partition="",
            qos="",
            job_name=f"preprocess-{folder.name}",
            logging_dir=str(folder),
            job_id_retriever=_job_number,
            skip_completed=False,
        )
        self._todo, self._script = list(todo), script

    def get_incomplete_ranks(self, ranks: Any = None, skip_completed: Any = None) -> list[int]:
        """Numbers of the array tasks to queue."""
        return self._todo

    def launch_merge_stats(self) -> None:
        """Does nothing: report.json has the counts."""

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """Script of a job; memory, time and partition are the defaults of the cluster unless the user gives them."""
        kept = {key: value for key, value in sbatch_args.items() if key not in ("mem-per-cpu", "time", "partition")}
        options = [f"--{key}={shlex.quote(str(value))}" if value else f"--{key}" for key, value in kept.items()]
        return "\n".join(["#!/bin/bash", *(f"#SBATCH {option}" for option in options), self._script, ""])


def submit(
    arguments: Sequence[str], *, output: str, todo: Sequence[int], array_tasks: int, workers: int, extra: str
) -> Submitted:
    """Queue the array and the job that waits for it.

    Args:
        arguments: command line without the name of the program.
        output: folder of the dataset.
        todo: numbers of the array tasks that have shards to make.
        array_tasks: number of array tasks that share all shards.
        workers: processes of an array task, each with its own core.
        extra: further options of sbatch, quoted as in a shell; they override ours.

    Raises:
        UsageError: sbatch is missing or refuses.
        StorageError: the folder of the logs cannot be made.
    """
    try:
        options = shlex.split(extra)
    except ValueError as error:
        raise UsageError(f"--sbatch {extra}: {error}; quote the options as in a shell") from error
    folder = Path(os.path.abspath(output)) / LOGS / f"{get_timestamp()}_{get_random_str()}"
    command = shlex.join([sys.executable, str(_SCRIPT), *arguments])
    first = f"#SBATCH {shlex.join(options)}\n" if options else ""

    def script(part: str) -> str:
        return f"{first}export {JOB_FOLDER}={shlex.quote(str(folder / part))}\nexec {command}"

    shared = {"chdir": os.getcwd(), "open-mode": "append"}
    array = _Jobs(
        folder / SHARDS, tasks=array_tasks, todo=todo, script=script(SHARDS), cpus_per_task=workers, sbatch_args=shared
    )
    ending = shared | {"kill-on-invalid-dep": "yes"}
    merge = _Jobs(folder / MERGE, tasks=1, todo=[0], script=script(MERGE), depends=array, sbatch_args=ending)
    try:
        _launch(array)
        try:
            _launch(merge)
        except UsageError as error:
            if array.job_id == -1:
                raise
            raise UsageError(
                f"{error}; job {array.job_id} was queued already, and the same command merges its shards"
            ) from error
    except OSError as error:
        raise StorageError(f"{folder}: cannot write ({error.strerror}); choose another --output") from error
    return Submitted(array=None if array.job_id == -1 else array.job_id, merge=merge.job_id, folder=folder)


def run_array_task(folder: Path, *, array_tasks: int, work: Callable[[int], object]) -> None:
    """Do the work of this process, inside a job.

    Args:
        folder: folder of the job, from the variable `JOB_FOLDER`.
        array_tasks: number of array tasks that share all shards.
        work: called with the number of this array task, from 0.

    Raises:
        SystemExit: the work failed; the message is in the output of the job.
    """

    def step(data: object, rank: int, world_size: int) -> None:
        try:
            work(rank)
        except MegaVLError as error:
            # datatrove would print any other exception with every frame and its variables.
            say_error(error)
            raise SystemExit(error.exit_code) from None

    _Jobs(folder, tasks=array_tasks if folder.name == SHARDS else 1, pipeline=[step]).run()


def _launch(jobs: _Jobs) -> None:
    # The caller reports what was queued; inside the jobs datatrove may log.
    logger.disable("datatrove")
    try:
        jobs.launch_job()
    except FileNotFoundError as error:
        if error.filename != "sbatch":
            raise
        raise UsageError(
            f"--engine slurm: cannot start sbatch ({error.strerror}); run this on a login node, or use --engine local"
        ) from error
    except subprocess.CalledProcessError as error:
        raise UsageError(
            f"--engine slurm: sbatch refused, code {error.returncode}, for the reason above; "
            "correct --sbatch or --num-tasks"
        ) from error
    finally:
        logger.enable("datatrove")
        Path(jobs.logging_dir.resolve_paths("executor.pik")).unlink(missing_ok=True)


def _job_number(printed: str) -> str:
    """The number in `Submitted batch job 40`, after which some clusters print their name."""
    found = re.search(r"job (\d+)", printed)
    if found is None:
        raise UsageError(f"--engine slurm: sbatch printed {printed.strip()!r}, which names no job; look with squeue")
    return found[1]
