"""SIGTERM, SIGUSR1 and Ctrl-C: save after the current step, and leave with code 75 or 130."""

from __future__ import annotations

import contextlib
import signal
import socket
from types import FrameType


class StopFlag:
    """Set by a signal in this process; the handlers do nothing else. Loader workers do not inherit them."""

    def __init__(self) -> None:
        self.raised = False
        """This rank was asked to stop."""
        self.interrupted = False
        """By Ctrl-C."""
        self._interrupts = 0
        self._arrived: socket.socket | None = None

    def watch_interrupts(self) -> None:
        """Count Ctrl-C from now on, even while the main thread waits in a library's call; only it may call this."""
        self._arrived, self._written = socket.socketpair()
        for end in (self._arrived, self._written):
            end.setblocking(False)
        # Python's own handler runs between two of its instructions; this number is written at once.
        signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._interrupt)

    def install(self) -> None:
        """Install the handlers of the signals by which schedulers pre-empt."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._raise)

    def interrupts(self) -> int:
        """How often Ctrl-C came; any thread may ask."""
        if self._arrived is not None:
            with contextlib.suppress(BlockingIOError):
                self._interrupts += self._arrived.recv(1 << 12).count(signal.SIGINT)
        return self._interrupts

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.raised = self.interrupted = True
