"""A count that grows while this process reads, writes or hashes files, so that a watchdog tells slow from stuck."""

from __future__ import annotations

_pieces = 0


def note() -> None:
    """A piece of a file was read, written or hashed."""
    global _pieces
    # Threads may lose one of two counts; that the number changes is all that matters.
    _pieces += 1


def count() -> int:
    """Pieces so far."""
    return _pieces
