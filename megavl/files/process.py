"""Tells a process from a later one that got the same number."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of some machine."""

    machine: str
    """Boot and pid namespace: processes of one machine see each other's numbers. Empty if the system has no /proc."""
    pid: int
    started: int
    """Start in clock ticks since the machine booted; 0 if the system has no /proc."""

    @staticmethod
    def running(pid: int) -> Process | None:
        """The process that has this number here; None if there is none or it cannot be seen."""
        found = _state_and_start(pid)
        return Process(machine=this_machine(), pid=pid, started=found[1]) if found else None

    @staticmethod
    def this() -> Process:
        """The calling process."""
        pid = os.getpid()
        return Process.running(pid) or Process(machine="", pid=pid, started=0)

    def is_alive(self) -> bool | None:
        """Whether it still runs; None if this process cannot tell, for example from another machine."""
        if not self.machine or self.machine != this_machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            pass
        found = _state_and_start(self.pid)
        if found is None:
            return None
        state, started = found
        return started == self.started and state not in "ZX"


def this_machine() -> str:
    """The `machine` of the processes that this process sees."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, ValueError):
        return ""


def parent_of(pid: int) -> int | None:
    """Number of a process's parent; None if the process is gone or cannot be seen."""
    fields = _fields(pid)
    return int(fields[1]) if fields else None


def _state_and_start(pid: int) -> tuple[str, int] | None:
    fields = _fields(pid)
    return (fields[0], int(fields[19])) if fields else None


def _fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on: the second is a name that may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    except (OSError, ValueError):
        return None
