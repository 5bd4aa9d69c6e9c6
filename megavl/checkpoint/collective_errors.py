"""Runs a function on some ranks and raises its error on all of them.

If one rank failed alone, the others would hang in the next collective. Without an initialised process group, the world
is this process alone.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch.distributed as dist

from megavl.config import errors
from megavl.files import activity

T = TypeVar("T")

BEAT_S = 10.0
"""How often rank 0 tells the waiting ranks that it reads, writes or hashes files, seconds."""

_Outcome = tuple[Any, "tuple[str, str] | None"]


def rank() -> int:
    """Global rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its (picklable) result on every rank.

    It runs in a thread and should only work on files. Hashing a large checkpoint takes longer than `parallel.timeout_s`
    on slow storage: while files get on, the waiting ranks are told so, and their watchdogs count it as progress.

    Raises:
        MegaVLError: the same class and text on every rank when rank 0 raised one.
        RuntimeError: on the other ranks, when rank 0 raised anything else.
    """
    if not dist.is_initialized():
        return action()
    local: Exception | None = None
    if dist.get_rank() == 0:
        with ThreadPoolExecutor(max_workers=1) as pool:
            running = pool.submit(_attempt, action)
            seen = activity.count()
            while not wait([running], timeout=BEAT_S).done:
                if activity.count() != seen:
                    seen = activity.count()
                    dist.broadcast_object_list([None], src=0)
            outcome, local = running.result()
        dist.broadcast_object_list([outcome], src=0)
    else:
        received: list[_Outcome | None] = [None]
        dist.broadcast_object_list(received, src=0)
        while received[0] is None:
            activity.note()
            dist.broadcast_object_list(received, src=0)
        outcome = received[0]
    _raise_same_error([outcome[1]], local)
    result: T = outcome[0]
    return result


def on_every_rank(action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return all (picklable) results in rank order.

    Raises:
        MegaVLError: the error of the lowest failing rank, on every rank.
        RuntimeError: on the other ranks, when that error is of another class.
    """
    if not dist.is_initialized():
        return [action()]
    return _share_outcomes(*_attempt(action))


def on_every_rank_for_long(action: Callable[[], T]) -> list[T]:
    """As `on_every_rank`, for an action that only works on files and takes much longer on some ranks.

    It runs in a thread. While files get on anywhere, the watchdogs of all ranks count it as progress.
    """
    if not dist.is_initialized():
        return [action()]
    with ThreadPoolExecutor(max_workers=1) as pool:
        running, seen = pool.submit(_attempt, action), activity.count()
        while True:
            done = bool(wait([running], timeout=BEAT_S).done)
            reports: list[tuple[bool, bool]] = [(done, False)] * dist.get_world_size()
            dist.all_gather_object(reports, (done, activity.count() != seen))
            if all(ended for ended, _ in reports):
                return _share_outcomes(*running.result())
            if any(moved for _, moved in reports):
                activity.note()
            seen = activity.count()


def _share_outcomes(mine: _Outcome, local: Exception | None) -> list[Any]:
    outcomes: list[_Outcome] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(outcomes, mine)
    _raise_same_error([error for _, error in outcomes], local)
    return [value for value, _ in outcomes]


def _attempt(action: Callable[[], T]) -> tuple[_Outcome, Exception | None]:
    try:
        return (action(), None), None
    except Exception as error:
        return (None, (type(error).__name__, str(error))), error


def _raise_same_error(found: list[tuple[str, str] | None], local: Exception | None) -> None:
    failures = [(number, *error) for number, error in enumerate(found) if error is not None]
    if not failures:
        return
    number, name, text = failures[0]
    known = getattr(errors, name, None)
    if isinstance(known, type) and issubclass(known, errors.MegaVLError):
        raise known(text) from local
    if local is not None:
        raise local
    raise RuntimeError(f"rank {number}: {name}: {text}")
