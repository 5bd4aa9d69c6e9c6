"""Tells which ranks are missing, so that the message about a hang or a lost peer names them.

Every rank leaves a row in the store of the process group a few times within the timeout: a count, its step and section,
and its process. A rank that gets no further compares two readings of all rows. The store is used by a thread of its
own, since it does not answer if the process that holds it has stopped.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megavl.files.process import Process
from megavl.train.supervise.exit_status import ExitStatus

_SHOWN = 4
_PATIENCE_S = 2.0
"""How long a message waits for a last reading, seconds."""


class Store(Protocol):
    """What is used of torch's store."""

    def set(self, key: str, value: str, /) -> None:
        """Write."""

    def get(self, key: str, /) -> bytes:
        """Read, waiting until it is there."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all are there."""


@dataclass(frozen=True, kw_only=True)
class _Sign:
    """The last row of a rank, and since when this rank has seen it unchanged."""

    row: Mapping[str, Any] | None
    """None if the rank has not written any."""
    since: float
    changed: bool
    """Whether it was written since this rank looks, so that its step and section are of now."""

    @property
    def position(self) -> str:
        return f"step {self.row['step']} while {self.row['section']}" if self.row else ""

    def absence(self, *, silence_s: float) -> str | None:
        """How the rank is missing, if it is; that a process is gone is seen on its machine only."""
        silent = time.monotonic() - self.since
        if self.row is None:
            return "no sign of life since the ranks met" if silent > silence_s else None
        process = Process(machine=self.row["machine"], pid=self.row["pid"], started=self.row["started"])
        gone = process.is_alive() is False
        if not gone and silent <= silence_s:
            return None
        how = "gone" if gone else f"no sign of life for {silent:.0f} s"
        seen = f", last seen at {self.position}" if "section" in self.row else ""
        return f"host {self.row['host']}, pid {self.row['pid']}, {how}{seen}"


class RollCall:
    """Signs of life of all ranks; before `begin` it has nothing to say."""

    def __init__(self, status: ExitStatus, *, timeout_s: float) -> None:
        """Prepare.

        Args:
            status: this rank's number, step and section.
            timeout_s: longest time without progress, seconds; rows are written six times within it.
        """
        self._status, self.period_s = status, max(1.0, timeout_s / 6)
        self._signs: dict[int, _Sign] = {}
        self._answer: dict[int, _Sign] = {}
        self._reading = False
        self._holder: _Sign | None = None
        self._ended, self._wake = threading.Event(), threading.Event()
        self._asked, self._reached, self._read = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, store: Store, *, world_size: int) -> None:
        """Start writing rows, after the ranks have met."""
        self._store, self._world_size = store, world_size
        self._thread = threading.Thread(target=self._run, name="megavl-roll-call", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop; a store that does not answer is not waited for."""
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=_PATIENCE_S)

    def watch(self, stalled: bool) -> None:
        """Read the rows of all ranks as long as this rank gets no further."""
        if self._reading and not stalled:
            self._signs = {}
        self._reading = stalled

    def missing(self) -> str:
        """Names the ranks that are gone, silent, or elsewhere than this one; empty where nothing is known of any."""
        if self._thread is None:
            return ""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        gone = self._holder.absence(silence_s=math.inf) if self._holder and not agent else None
        if gone:
            # The store ended with it, so nothing can be read.
            return f"; missing: rank 0 ({gone})"
        self._reached.clear()
        self._read.clear()
        self._asked.set()
        self._wake.set()
        if not self._read.wait(_PATIENCE_S):
            if self._reached.is_set():
                # The store answers, but many ranks ask it.
                return ""
            return f"; missing: {'torchrun on the first machine' if agent else 'rank 0'}, which holds the ranks' store"
        lost, elsewhere = [], []
        here = f"step {self._status.step} while {self._status.section}"
        for rank, sign in sorted(self._answer.items()):
            if absence := sign.absence(silence_s=2 * self.period_s):
                lost.append(f"rank {rank} ({absence})")
            elif sign.changed and sign.position != here:
                elsewhere.append(f"rank {rank} is at {sign.position}")
        if lost:
            return f"; missing: {_listed(lost)}"
        return f"; {_listed(elsewhere)}" if elsewhere else ""

    def _run(self) -> None:
        process, count = Process.this(), 0
        fixed = {"host": socket.gethostname()[:64], "machine": process.machine, "pid": process.pid}
        while True:
            self._wake.clear()
            count += 1
            row = {"count": count, "step": self._status.step, "section": self._status.section}
            try:
                self._store.set(_key(self._status.rank), json.dumps({**fixed, "started": process.started, **row}))
                if self._holder is None and self._status.rank:
                    # Waits for it. Its step and section will be of long ago.
                    first = json.loads(self._store.get(_key(0)))
                    first = {key: first[key] for key in (*fixed, "started")}
                    self._holder = _Sign(row=first, since=time.monotonic(), changed=False)
                if self._reading or self._asked.is_set():
                    self._read_all()
            except RuntimeError:
                # The process that held the store has left.
                return
            if self._ended.is_set():
                return
            self._wake.wait(self.period_s)

    def _read_all(self) -> None:
        keys = {rank: _key(rank) for rank in range(self._world_size) if rank != self._status.rank}
        complete = self._store.check([*keys.values()])
        self._reached.set()
        there = keys if complete else {rank: key for rank, key in keys.items() if self._store.check([key])}
        # The stubs of torch 2.13 lack `multi_get`.
        found = self._store.multi_get([*there.values()]) if there else []  # type: ignore[attr-defined]
        rows = dict(zip(there, found, strict=True))
        # `watch` may take another dictionary meanwhile.
        signs = self._signs
        for rank in keys:
            row, old = json.loads(rows[rank]) if rank in rows else None, signs.get(rank)
            if old is None or row != old.row:
                signs[rank] = _Sign(row=row, since=time.monotonic(), changed=old is not None)
        self._answer = dict(signs)
        self._asked.clear()
        self._read.set()


def _key(rank: int) -> str:
    return f"megavl/roll call/{rank}"


def _listed(found: list[str]) -> str:
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return ", ".join([*found[:_SHOWN], *more])
