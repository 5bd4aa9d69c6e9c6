"""Fault injection for tests: `FAULT=<site>:<rank>:<step>:<kind>` makes one site fail; several are divided by commas.

Sites of a step: `load_data`, `training`, `evaluating`. Sites of a save, in order: `before_mkdir`, `mid_shard`,
`after_shard`, `after_manifest`, `after_rename`, `mid_retention`.

Kinds: `sigkill`, `sigterm`, `sigusr1`, `sigint` and `sigstop`. A RuntimeError: `raise` here, `async` at some later
instruction, `handler` in a signal handler. An OSError, as the file system would report it: `enospc`, `eio`. And
`abort`, `segfault`, `lock` (one that nobody releases), `slow` (45 s).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

_SLOW_S = 45


def inject_fault(site: str, *, rank: int, step: int) -> None:
    """Fail here if the environment asks for a fault at this site, rank and step."""
    plans = os.environ.get("FAULT")
    if not plans:
        return
    for plan in plans.split(","):
        wanted_site, wanted_rank, wanted_step, kind = plan.split(":")
        if (wanted_site, int(wanted_rank), int(wanted_step)) != (site, rank, step):
            continue
        if kind not in _KINDS:
            raise ValueError(f"FAULT={plan}: unknown kind {kind!r}")
        _KINDS[kind](f"fault at {site}")


def _signal(number: signal.Signals) -> Callable[[str], None]:
    return lambda where: os.kill(os.getpid(), number)


def _storage(number: int) -> Callable[[str], None]:
    def fail(where: str) -> None:
        raise OSError(number, os.strerror(number), where)

    return fail


def _raise(where: str) -> None:
    raise RuntimeError(where)


def _raise_later(where: str) -> None:
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(RuntimeError))


def _raise_in_handler(where: str) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        raise RuntimeError(where)

    signal.signal(signal.SIGUSR2, handle)
    os.kill(os.getpid(), signal.SIGUSR2)


def _segfault(where: str) -> None:
    ctypes.string_at(0)


def _lock(where: str) -> None:
    lock = threading.Lock()
    for _ in range(2):
        lock.acquire()


_KINDS: dict[str, Callable[[str], None]] = {
    "sigkill": _signal(signal.SIGKILL),
    "sigterm": _signal(signal.SIGTERM),
    "sigusr1": _signal(signal.SIGUSR1),
    "sigint": _signal(signal.SIGINT),
    "sigstop": _signal(signal.SIGSTOP),
    "raise": _raise,
    "async": _raise_later,
    "handler": _raise_in_handler,
    "enospc": _storage(errno.ENOSPC),
    "eio": _storage(errno.EIO),
    "abort": lambda where: os.abort(),
    "segfault": _segfault,
    "lock": _lock,
    "slow": lambda where: time.sleep(_SLOW_S),
}
