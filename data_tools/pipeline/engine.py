"""Runs tasks in this process or in worker processes; a worker that dies is replaced."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from data_tools.pipeline.job import Job, Task
from data_tools.pipeline.output import TaskSummary
from data_tools.pipeline.task import process_task
from megavl.config.errors import PeerError

_ATTEMPTS = 2
"""The tasks of a dead worker are tried once more, then the run ends."""
_POLL_S = 0.2

_progress: Any = None


def run_tasks(job: Job, tasks: Sequence[Task], *, count: int, workers: int) -> list[TaskSummary]:
    """Run tasks, with a progress bar on standard error.

    Args:
        count: number of tasks of the whole job.
        workers: number of processes; 1 runs the tasks in this process.

    Raises:
        PeerError: workers died twice.
        MegaVLError: the first error of a task.
    """
    if not tasks:
        return []
    total = sum(task.records for task in tasks)
    with tqdm(total=total, unit=" records", unit_scale=True, desc="preprocess", mininterval=_POLL_S) as bar:
        if workers <= 1 or len(tasks) == 1:
            return [_run_here(job, task, count=count, bar=bar) for task in tasks]
        return _run_pool(job, tasks, count=count, workers=min(workers, len(tasks)), bar=bar)


def _run_here(job: Job, task: Task, *, count: int, bar: Any) -> TaskSummary:
    start = bar.n
    return process_task(job, task, count=count, advance=lambda seen: bar.update(start + seen - bar.n) and None)


def _run_pool(job: Job, tasks: Sequence[Task], *, count: int, workers: int, bar: Any) -> list[TaskSummary]:
    done: dict[int, TaskSummary] = {}
    # No lock, which a killed worker would leave locked: each task alone writes its own slot.
    progress = multiprocessing.get_context("spawn").RawArray("q", len(tasks))
    for _ in range(_ATTEMPTS):
        left = [(slot, task) for slot, task in enumerate(tasks) if task.number not in done]
        try:
            for summary in _results(job, left, count=count, workers=workers, progress=progress, bar=bar):
                done[summary.number] = summary
        except BrokenProcessPool:
            bar.write("a worker process died; its work is started again")
            continue
        return [done[task.number] for task in tasks]
    raise PeerError(
        f"worker processes died {_ATTEMPTS} times ({len(done)} of {len(tasks)} shards done); "
        "look for lack of memory, then start again: finished shards are kept"
    )


def _results(
    job: Job, tasks: Sequence[tuple[int, Task]], *, count: int, workers: int, progress: Any, bar: Any
) -> Iterator[TaskSummary]:
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(progress, os.getpid()),
    )
    try:
        waiting: set[Future[TaskSummary]] = {pool.submit(_run_there, job, task, count, slot) for slot, task in tasks}
        while waiting:
            ready, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            bar.update(sum(progress) - bar.n)
            for future in ready:
                yield future.result()
    finally:
        # Every result is here, or none is wanted. A killed worker may have left the lock of the queue locked, where the
        # others would wait without end, and the pool for them.
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(progress: Any, parent: int) -> None:
    global _progress
    _progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent was killed, because nobody would collect its results."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


def _run_there(job: Job, task: Task, count: int, slot: int) -> TaskSummary:
    return process_task(job, task, count=count, advance=lambda seen: _progress.__setitem__(slot, seen))
