"""A thread that ends this rank when a collective cannot finish, because a peer is gone or hangs.

gloo reports both by itself. Under NCCL the main thread waits in a kernel that never ends. Later, the watchdog of torch
aborts the process with a signal and names neither step nor cause. This thread acts earlier and leaves with code 7.
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
"""Sections of a step; start and saves may take longer than a step."""
_ALONE = ("start", "joining the process group")
"""Sections in which the status of an earlier run may still be there."""


class Watchdog(threading.Thread):
    """Watches the progress of this rank, and the status file that a failing rank writes."""

    def __init__(
        self,
        status: ExitStatus,
        *,
        timeout_s: float,
        leave: Callable[[int, str], None],
        grace_s: float = 15.0,
        period_s: float = 1.0,
    ) -> None:
        """Prepare; `start()` starts watching.

        Args:
            timeout_s: longest time without progress inside a step, seconds.
            leave: ends the process with a code and a reason; called from this thread.
            grace_s: time for this rank to end by itself after another rank wrote its status, seconds.
            period_s: time between two checks, seconds.
        """
        super().__init__(name="megavl-watchdog", daemon=True)
        self.status, self.leave = status, leave
        self.timeout_s, self.grace_s, self.period_s = timeout_s, grace_s, period_s
        self._done = threading.Event()

    def stop(self) -> None:
        """Stop watching."""
        self._done.set()

    def run(self) -> None:
        """Check every `period_s`."""
        position, since, ended = "", time.monotonic(), None
        while not self._done.wait(self.period_s):
            now = time.monotonic()
            current = f"step {self.status.step} while {self.status.section}"
            if current != position:
                position, since = current, now
            if ended is None and self.status.section not in _ALONE and self.status.path.exists():
                ended = now
            rank = self.status.rank
            if ended is not None and now - ended > self.grace_s:
                self.leave(PeerError.exit_code, f"rank {rank} waited for a peer at {position}; {self._cause()}")
                return
            if self.status.section in _WATCHED and now - since > self.timeout_s:
                reason = f"rank {rank} made no progress for {now - since:.0f} s at {position}; a peer hangs or is lost"
                self.leave(PeerError.exit_code, reason)
                return

    def _cause(self) -> str:
        try:
            row = json.loads(self.status.path.read_text(encoding="utf-8"))
            return f"rank {row['rank']} had left with code {row['code']}: {row['reason']}"
        except (OSError, ValueError, KeyError, TypeError):
            print(f"warning: {self.status.path} cannot be read", file=sys.stderr, flush=True)
            return "another rank had left"
