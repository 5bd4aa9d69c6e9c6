"""Preprocessing as a SLURM job array through datatrove: tasks make shards, then one job makes the dataset.

datatrove divides the array, queues it, numbers the tasks, keeps their logs and puts them back into the queue when the
cluster asks for it. A task runs the very command that queued it; a variable names the folder of its job. What is done
follows from the shards' manifests, never from datatrove's marks, and nothing is unpickled: the copy of itself that
datatrove leaves for its own tasks is removed.
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

LOGS = "slurm"
"""Folder of the jobs' output, in the dataset's."""
JOB_FOLDER = "MEGAVL_PREPROCESS_JOB"
"""Variable with the folder of the job that a process belongs to; set by the scripts written here."""
SHARDS, MERGE = "shards", "merge"
"""The two jobs, and the last part of their folders' names."""
_SCRIPT = Path(__file__).parents[1] / "preprocess.py"


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """Numbers of the two jobs."""

    array: str | None
    """None where all shards were there already; of several arrays the last one."""
    merge: str
    folder: Path
    """Of their output."""


class _Jobs(SlurmPipelineExecutor):  # type: ignore[misc]
    """datatrove's array with our script, with quoted paths, and without its own idea of what is done."""

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
        """Tasks to queue."""
        return self._todo

    def launch_merge_stats(self) -> None:
        """Not needed: report.json has the counts."""

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """Script of a job; memory, time and partition are the cluster's own unless the user names them."""
        kept = {key: value for key, value in sbatch_args.items() if key not in ("mem-per-cpu", "time", "partition")}
        options = [f"--{key}={shlex.quote(str(value))}" if value else f"--{key}" for key, value in kept.items()]
        return "\n".join(["#!/bin/bash", *(f"#SBATCH {option}" for option in options), self._script, ""])


def submit(
    arguments: Sequence[str], *, output: str, todo: Sequence[int], tasks: int, workers: int, extra: str
) -> Submitted:
    """Queue the array and the job that waits for it.

    Args:
        arguments: of the command, without the program's name.
        output: folder of the dataset.
        todo: tasks that have shards to make.
        tasks: among which all shards are divided.
        workers: processes of a task, each on a core of its own.
        extra: further options of sbatch, as in a shell; they win over ours.

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
        folder / SHARDS, tasks=tasks, todo=todo, script=script(SHARDS), cpus_per_task=workers, sbatch_args=shared
    )
    merge = _Jobs(
        *(folder / MERGE,), tasks=1, todo=[0], script=script(MERGE), depends=array,
        sbatch_args=shared | {"kill-on-invalid-dep": "yes"},
    )  # fmt: skip
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


def run_task(folder: Path, *, tasks: int, work: Callable[[int], object]) -> None:
    """Do what this job of an array is for.

    Args:
        folder: of the job, from the variable `JOB_FOLDER`.
        tasks: among which all shards are divided.
        work: does the part of one task, 0 to tasks - 1.

    Raises:
        SystemExit: with the error's exit code when the work fails; the message stands in the job's output.
    """

    def step(data: object, rank: int, world_size: int) -> None:
        try:
            work(rank)
        except MegaVLError as error:
            # As an error of its own datatrove would print it with every frame and value on the way.
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None

    _Jobs(folder, tasks=tasks if folder.name == SHARDS else 1, pipeline=[step]).run()


def _launch(jobs: _Jobs) -> None:
    # The caller says what was queued; in the jobs themselves datatrove's lines are welcome.
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
