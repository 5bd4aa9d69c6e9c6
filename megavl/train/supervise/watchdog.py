"""A thread that ends this rank when a collective cannot: a peer is gone or stuck and the backend does not say so.

gloo reports both by itself. Under NCCL the main thread waits in a kernel that never ends, until torch's own watchdog
aborts the process with a signal that names neither step nor cause; this thread is earlier and leaves with code 7.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable

from megavl.config.errors import PeerError
from megavl.train.supervise.exit_status import ExitStatus

_WATCHED = ("loading data", "training")
"""Sections that a step passes; start and saves may rightly take longer than a step."""
_ALONE = ("start", "joining the process group")
"""Sections before rank 0 is known to have removed the status of an earlier run."""


class Watchdog(threading.Thread):
    """Watches the steps of this rank and the status file that a failing rank writes."""

    def __init__(
        self,
        status: ExitStatus,
        *,
        timeout_s: float,
        leave: Callable[[int, str], None],
        grace_s: float = 15.0,
        period_s: float = 1.0,
    ) -> None:
        """Prepare; `start()` begins to watch.

        Args:
            status: of this rank.
            timeout_s: longest time between two changes of step or section inside a step, seconds.
            leave: ends the process with a code and a reason; called from this thread.
            grace_s: time that this rank has to end by itself after another one recorded why it left, seconds.
            period_s: time between two looks, seconds.
        """
        super().__init__(name="megavl-watcher", daemon=True)
        self.status, self.leave = status, leave
        self.timeout_s, self.grace_s, self.period_s = timeout_s, grace_s, period_s
        self._done = threading.Event()

    def stop(self) -> None:
        """Watch no longer."""
        self._done.set()

    def run(self) -> None:
        """Look every `period_s`."""
        place, since, ended = "", time.monotonic(), None
        while not self._done.wait(self.period_s):
            now = time.monotonic()
            current = f"step {self.status.step} while {self.status.section}"
            if current != place:
                place, since = current, now
            if ended is None and self.status.section not in _ALONE and self.status.path.exists():
                ended = now
            rank = self.status.rank
            if ended is not None and now - ended > self.grace_s:
                self.leave(PeerError.exit_code, f"rank {rank} waited for a peer at {place}; {self._cause()}")
                return
            if self.status.section in _WATCHED and now - since > self.timeout_s:
                reason = f"rank {rank} made no progress for {now - since:.0f} s at {place}; a peer hangs or is lost"
                self.leave(PeerError.exit_code, reason)
                return

    def _cause(self) -> str:
        try:
            row = json.loads(self.status.path.read_text(encoding="utf-8"))
            return f"rank {row['rank']} had left with code {row['code']}: {row['reason']}"
        except (OSError, ValueError, KeyError, TypeError):
            print(f"warning: {self.status.path} cannot be read", file=sys.stderr, flush=True)
            return "another rank had left"
