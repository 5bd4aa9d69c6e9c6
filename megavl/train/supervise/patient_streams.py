"""Standard output and error that never end a run: what a full disk or a closed terminal does not take is left out."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


class PatientStream:
    """A text stream whose writes do not fail."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write as much as the stream takes."""
        # ValueError: closed.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def install() -> None:
    """Replace both streams until the process ends: the interpreter flushes them once more then."""
    if not isinstance(sys.stdout, PatientStream):
        sys.stdout, sys.stderr = PatientStream(sys.stdout), PatientStream(sys.stderr)  # type: ignore[assignment]
