"""`<run>/exit_status.json` says why a run ended; torchrun turns every exit code into 1."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from megavl.config.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, PeerError, StorageError
from megavl.files.durable import set_aside
from megavl.foreign.printing import say
from megavl.train.supervise.claim import RunClaim

_RESUMABLE = (EXIT_PREEMPTED, EXIT_INTERRUPTED, PeerError.exit_code)
COPY = "MEGAVL_EXIT_STATUS"
"""Environment variable: a file that gets the status too, also that of a run that was refused its directory."""


class ExitStatus:
    """Writes the status once: the first writer wins, so later errors of other ranks cannot hide the cause."""

    def __init__(self, run_dir: str | Path, *, rank: int, claim: RunClaim | None = None) -> None:
        self.path = Path(run_dir) / "exit_status.json"
        self.rank = rank
        self.claim = claim or RunClaim(run_dir)
        self.step = 0
        self.section = "start"
        self.failed = False
        """Whether the storage refused the status, which was printed instead."""

    def clear(self) -> None:
        """Remove the last run's status; rank 0 does this first.

        Raises:
            StorageError: the directory cannot be written.
        """
        try:
            if self.path.is_dir() and not self.path.is_symlink():
                set_aside(self.path)
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"run.dir: cannot remove {self.path} ({error.strerror}); choose a writable directory"
            ) from error

    def write(self, code: int, reason: str) -> bool:
        """Record how this run ended; returns whether this call was the first to do so.

        Nothing is written into a directory that another run owns. If the storage fails, the status is printed.
        """
        text, first = self._text(code, reason), self.write_copy(code, reason)
        if not self.claim.permits_status():
            return first
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return _write_once(self.path, text, rank=self.rank)
        except OSError as error:
            self.failed = True
            say(
                f"warning: {self.path} cannot be written ({error.strerror}); it would say: {text.rstrip()}",
                to_errors=True,
            )
            return first

    def write_copy(self, code: int, reason: str) -> bool:
        """Record the end outside of the run directory, if `MEGAVL_EXIT_STATUS` says where.

        A launch script learns the code that way even if another run owns the directory. Returns as `write`.
        """
        if copy := os.environ.get(COPY):
            with contextlib.suppress(OSError):
                return _write_once(Path(copy), self._text(code, reason), rank=self.rank)
        return True

    def _text(self, code: int, reason: str) -> str:
        row = {
            "code": code,
            "reason": reason,
            "rank": self.rank,
            "step": self.step,
            "resumable": code in _RESUMABLE,
        }
        return json.dumps(row) + "\n"


def _write_once(path: Path, text: str, *, rank: int) -> bool:
    """Create a file; returns False if it exists."""
    draft = path.with_name(f".{path.stem}.{rank}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        # A hard link fails if the name exists, and readers never see partial content.
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links, or a full one: then this fails too.
        return _write_exclusively(path, text)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    return True


def _write_exclusively(path: Path, text: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True
