"""Runs tasks in this process or in worker processes; a worker that dies is replaced.

Workers are forked where this process has one thread: they start in milliseconds, and share its modules and tokenizer.
A fork among threads could copy a lock that nobody releases; new interpreters are started then.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from data_tools.pipeline.job import Job, Task
from data_tools.pipeline.output import TaskSummary
from data_tools.pipeline.task import process_task
from megavl.config.errors import PeerError

_ATTEMPTS = 2
"""The tasks of a dead worker are tried once more, then the run ends."""
_POLL_S = 0.2
_LOG_S = 10.0
"""Between two lines of the progress bar where standard error is no terminal."""

_progress: Any = None


class Workers:
    """Processes for the tasks of one run; the end of the context ends them."""

    def __init__(self, number: int, *, tasks: int) -> None:
        """Fork the processes if possible; otherwise they start with the first task.

        To be called before the output is locked, because a forked process holds the open files of this one.

        Args:
            number: of processes; up to 1, the tasks run in this process.
            tasks: most tasks that will be run.
        """
        self._number = min(number, tasks)
        # No lock, which a killed worker would leave locked: each task alone writes its own slot.
        self._progress = multiprocessing.get_context("spawn").RawArray("q", tasks)
        self._pool: ProcessPoolExecutor | None = None
        if self._number > 1 and _has_one_thread():
            self._pool = self._open("fork")
            # The first call starts all processes.
            self._pool.submit(os.getpid)

    def run(self, job: Job, tasks: Sequence[Task], *, count: int) -> list[TaskSummary]:
        """Run tasks, with a progress bar on standard error, and end the processes.

        Args:
            job: the run.
            tasks: those to run, in order.
            count: number of tasks of the whole job.

        Raises:
            PeerError: workers died twice.
            MegaVLError: the first error of a task.
        """
        if not tasks:
            return []
        total = sum(task.records for task in tasks)
        seconds = _POLL_S if sys.stderr.isatty() else _LOG_S
        with tqdm(total=total, unit=" records", unit_scale=True, desc="preprocess", mininterval=seconds) as bar:
            if self._number <= 1 or len(tasks) == 1:
                return [_run_here(job, task, count=count, bar=bar) for task in tasks]
            return self._run_there(job, tasks, count=count, bar=bar)

    def close(self) -> None:
        """End the processes; further calls do nothing."""
        if self._pool is None:
            return
        # Every result is here, or none is wanted. A killed worker may have left the lock of the queue locked, where the
        # others would wait without end, and the pool for them.
        for process in multiprocessing.active_children():
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_there(self, job: Job, tasks: Sequence[Task], *, count: int, bar: Any) -> list[TaskSummary]:
        done: dict[int, TaskSummary] = {}
        for _ in range(_ATTEMPTS):
            left = [(slot, task) for slot, task in enumerate(tasks) if task.number not in done]
            try:
                for summary in self._results(job, left, count=count, bar=bar):
                    done[summary.number] = summary
            except BrokenProcessPool:
                bar.write("a worker process died; its work is started again")
                continue
            return [done[task.number] for task in tasks]
        raise PeerError(
            f"worker processes died {_ATTEMPTS} times ({len(done)} of {len(tasks)} shards done); "
            "look for lack of memory, then start again: finished shards are kept"
        )

    def _results(self, job: Job, tasks: Sequence[tuple[int, Task]], *, count: int, bar: Any) -> Iterator[TaskSummary]:
        self._pool = pool = self._pool or self._open("spawn")
        try:
            waiting: set[Future[TaskSummary]] = {pool.submit(_run_task, job, task, count, slot) for slot, task in tasks}
            while waiting:
                ready, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                bar.update(sum(self._progress) - bar.n)
                for future in ready:
                    yield future.result()
        finally:
            self.close()

    def _open(self, method: str) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._number,
            mp_context=multiprocessing.get_context(method),
            initializer=_start_worker,
            initargs=(self._progress, os.getpid()),
        )


def _has_one_thread() -> bool:
    """Whether nothing else runs in this process; libraries start threads of which Python does not know."""
    threads = Path("/proc/self/task")
    return threads.is_dir() and len(list(threads.iterdir())) == 1


def _run_here(job: Job, task: Task, *, count: int, bar: Any) -> TaskSummary:
    start = bar.n
    return process_task(job, task, count=count, advance=lambda seen: bar.update(start + seen - bar.n) and None)


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


def _run_task(job: Job, task: Task, count: int, slot: int) -> TaskSummary:
    return process_task(job, task, count=count, advance=lambda seen: _progress.__setitem__(slot, seen))
