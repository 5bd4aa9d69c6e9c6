"""SIGTERM and SIGUSR1: save after the current step and leave with code 75."""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """Set by a signal in this process; the handler does nothing else. Loader workers do not inherit it."""

    def __init__(self) -> None:
        self.raised = False

    def install(self) -> None:
        """Install the handlers."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
