"""`<run>/exit_status.json` says why a run ended; torchrun turns every exit code into 1."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megavl.config.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, PeerError

_RESUMABLE = (EXIT_PREEMPTED, EXIT_INTERRUPTED, PeerError.exit_code)


class ExitStatus:
    """Writes the status once: the first writer wins, so later errors of other ranks cannot hide the cause."""

    def __init__(self, run_dir: str | Path, *, rank: int) -> None:
        self.path = Path(run_dir) / "exit_status.json"
        self.rank = rank
        self.step = 0
        self.section = "start"

    def clear(self) -> None:
        """Remove the last run's status; rank 0 does this first."""
        self.path.unlink(missing_ok=True)

    def write(self, code: int, reason: str) -> bool:
        """Record how this run ended; returns whether this call was the first to do so."""
        row = {
            "code": code,
            "reason": reason,
            "rank": self.rank,
            "step": self.step,
            "resumable": code in _RESUMABLE,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".exit_status.{self.rank}.{os.getpid()}")
        draft.write_text(json.dumps(row) + "\n", encoding="utf-8")
        try:
            # A hard link fails if the name exists, and readers never see partial content.
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True
