"""A thread that ends this rank when it gets no further, because a peer is gone or hangs, or a file never ends.

gloo reports both by itself. Under NCCL the main thread waits in a kernel that never ends. Later, the watchdog of torch
aborts the process with a signal and names neither step nor cause. This thread acts earlier and leaves with code 7. It
also leaves at Ctrl-C where no step would end soon: the main thread may wait in a library's call.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from megavl.config.errors import EXIT_INTERRUPTED, PeerError
from megavl.files import activity
from megavl.files.process import Process
from megavl.foreign.printing import say
from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.supervise.roll_call import RollCall
from megavl.train.supervise.signals import StopFlag

_UNWATCHED = ("building the model",)
"""Sections that wait neither for peers nor for files, and may take longer than a step."""
_STEP = ("loading data", "training", "evaluating", "saving", "leaving")
"""Sections of a step, at whose end a run saves if it is asked to stop, and the end of the run."""
_ALONE = ("start", "joining the process group", "leaving")
"""Sections in which the status may be that of an earlier run, or say that this one has finished."""


class Watchdog(threading.Thread):
    """Watches the progress of this rank, and the status file that a failing rank writes."""

    def __init__(
        self,
        status: ExitStatus,
        *,
        timeout_s: float,
        leave: Callable[[int, str], None],
        stop: StopFlag | None = None,
        launcher: Process | None = None,
        roll_call: RollCall | None = None,
        grace_s: float = 15.0,
        period_s: float = 1.0,
    ) -> None:
        """Prepare; `start()` starts watching.

        Args:
            timeout_s: longest time without progress, seconds. Another section or step is progress, and so is every
                piece of a file that this process reads, writes or hashes.
            leave: ends the process with a code and a reason; called from this thread.
            stop: knows of Ctrl-C. The first one ends a run that has not begun a step, the second one any.
            launcher: torchrun of this rank, which leaves when it was killed.
            roll_call: names the ranks that are missing.
            grace_s: time for this rank to end by itself after another rank wrote its status, seconds.
            period_s: time between two checks, seconds.
        """
        super().__init__(name="megavl-watchdog", daemon=True)
        self.status, self.leave, self.stop_flag, self.launcher = status, leave, stop, launcher
        self.roll_call = roll_call or RollCall(status, timeout_s=timeout_s)
        self.timeout_s, self.grace_s, self.period_s = timeout_s, grace_s, period_s
        self._done = threading.Event()

    def stop(self) -> None:
        """Stop watching."""
        self._done.set()

    def run(self) -> None:
        """Check every `period_s`."""
        seen: tuple[str, int] | None = None
        since, ended = time.monotonic(), None
        while not self._done.wait(self.period_s):
            now = time.monotonic()
            position = f"step {self.status.step} while {self.status.section}"
            if (position, activity.count()) != seen:
                seen, since = (position, activity.count()), now
            self.roll_call.watch(now - since > self.timeout_s / 3)
            if reason := self._interrupted():
                self.leave(EXIT_INTERRUPTED, f"{reason} at {position}")
                return
            if ended is None and self.status.section not in _ALONE and self.status.path.is_file():
                ended = now
            rank = self.status.rank
            if self.launcher is not None and self.launcher.is_alive() is False:
                reason = f"rank {rank} left at {position}; its launcher (torchrun, pid {self.launcher.pid}) was killed"
                self.leave(PeerError.exit_code, reason)
                return
            if ended is not None and now - ended > self.grace_s:
                self.leave(PeerError.exit_code, f"rank {rank} waited for a peer at {position}; {self._cause()}")
                return
            if self.status.section not in _UNWATCHED and now - since > self.timeout_s:
                reason = (
                    f"rank {rank} made no progress for {now - since:.0f} s at {position}; "
                    f"a peer hangs or is lost, or a file never ends{self.roll_call.missing()}"
                )
                self.leave(PeerError.exit_code, reason)
                return

    def _interrupted(self) -> str:
        """Why Ctrl-C ends this rank now, if it does."""
        count = self.stop_flag.interrupts() if self.stop_flag is not None else 0
        if count > 1:
            return "interrupted again, so left without saving"
        return "interrupted before the first step" if count and self.status.section not in _STEP else ""

    def _cause(self) -> str:
        try:
            row = json.loads(self.status.path.read_text(encoding="utf-8"))
            return f"rank {row['rank']} had left with code {row['code']}: {row['reason']}"
        except (OSError, ValueError, KeyError, TypeError):
            say(f"warning: {self.status.path} cannot be read", to_errors=True)
            return "another rank had left"
