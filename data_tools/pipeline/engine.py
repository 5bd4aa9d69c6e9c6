"""Running units in this process, or in worker processes that are watched."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from data_tools.pipeline.job import Job, Unit
from data_tools.pipeline.output import UnitSummary
from data_tools.pipeline.task import process_unit
from megavl.config.errors import PeerError

_ATTEMPTS = 2
"""A lost worker's units are tried once more, then the run ends."""
_POLL_S = 0.2

_progress: Any = None


def run_units(job: Job, units: Sequence[Unit], *, count: int, workers: int) -> list[UnitSummary]:
    """Process units, with a progress bar on standard error.

    Args:
        job: settings.
        units: what to do.
        count: units of the whole job.
        workers: processes; 1 works in this one.

    Raises:
        PeerError: workers died twice.
        MegaVLError: the first error of a unit.
    """
    if not units:
        return []
    total = sum(unit.records for unit in units)
    with tqdm(total=total, unit=" records", unit_scale=True, desc="preprocess", mininterval=_POLL_S) as bar:
        if workers <= 1 or len(units) == 1:
            return [_run_here(job, unit, count=count, bar=bar) for unit in units]
        return _run_pool(job, units, count=count, workers=min(workers, len(units)), bar=bar)


def _run_here(job: Job, unit: Unit, *, count: int, bar: Any) -> UnitSummary:
    start = bar.n
    return process_unit(job, unit, count=count, advance=lambda seen: bar.update(start + seen - bar.n) and None)


def _run_pool(job: Job, units: Sequence[Unit], *, count: int, workers: int, bar: Any) -> list[UnitSummary]:
    done: dict[int, UnitSummary] = {}
    # A plain shared array without a lock: a killed worker cannot leave it locked. One slot per unit, one writer each.
    progress = multiprocessing.get_context("spawn").RawArray("q", len(units))
    for _ in range(_ATTEMPTS):
        left = [(slot, unit) for slot, unit in enumerate(units) if unit.number not in done]
        try:
            for summary in _results(job, left, count=count, workers=workers, progress=progress, bar=bar):
                done[summary.number] = summary
        except BrokenProcessPool:
            bar.write("a worker process died; its work is started again")
            continue
        return [done[unit.number] for unit in units]
    raise PeerError(
        f"worker processes died {_ATTEMPTS} times ({len(done)} of {len(units)} shards done); "
        "look for lack of memory, then start again: finished shards are kept"
    )


def _results(
    job: Job, units: Sequence[tuple[int, Unit]], *, count: int, workers: int, progress: Any, bar: Any
) -> Iterator[UnitSummary]:
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(progress, os.getpid()),
    )
    try:
        waiting: set[Future[UnitSummary]] = {pool.submit(_run_there, job, unit, count, slot) for slot, unit in units}
        while waiting:
            ready, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            bar.update(sum(progress) - bar.n)
            for future in ready:
                yield future.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(progress: Any, parent: int) -> None:
    global _progress
    _progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent was killed; nobody would collect its work."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


def _run_there(job: Job, unit: Unit, count: int, slot: int) -> UnitSummary:
    advance: Callable[[int], None] = lambda seen: _progress.__setitem__(slot, seen)  # noqa: E731
    return process_unit(job, unit, count=count, advance=advance)
