"""Errors a user can cause, each with the exit code that every command returns for it.

A message names what is wrong, where (file or dotted recipe path), the value found, and the remedy.
"""

EXIT_PREEMPTED = 75
"""Exit code of a run that saved and stopped at a signal (EX_TEMPFAIL of sysexits)."""
EXIT_INTERRUPTED = 130
"""Exit code of a run that Ctrl-C ended, as of every command that SIGINT ends."""


class MegaVLError(ValueError):
    """Base class of the errors that end a command with one message instead of a traceback."""

    exit_code = 1


class UsageError(MegaVLError):
    """Wrong command line or recipe."""

    exit_code = 2


class DataError(MegaVLError):
    """Invalid input data, shard or tokenizer."""

    exit_code = 3


class CheckpointError(MegaVLError):
    """Missing, damaged or mismatching weights."""

    exit_code = 4


class StorageError(MegaVLError):
    """Full, read-only or failing storage."""

    exit_code = 5


class NumericsError(MegaVLError):
    """Too many steps in a row with a loss or gradient that is not finite."""

    exit_code = 6


class PeerError(MegaVLError):
    """Another rank was lost, or a collective timed out."""

    exit_code = 7


def one_line(error: BaseException, *, limit: int | None = 200) -> str:
    """The text of another library's error on one line, truncated to `limit` characters."""
    return " ".join(str(error).split())[:limit]


def first_line(error: BaseException, *, limit: int = 200) -> str:
    """The first line of another library's error, truncated; empty for one without a text."""
    return next(iter(str(error).strip().splitlines()), "")[:limit]
