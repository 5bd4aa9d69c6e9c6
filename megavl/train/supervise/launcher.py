"""The torchrun that started this rank: when it is killed, its ranks live on and must leave by themselves."""

from __future__ import annotations

import os
from pathlib import Path

from megavl.files.process import Process, parent_of

_MARK = b"TORCHELASTIC_RUN_ID="
"""In the environment of every process below torchrun, but not of torchrun itself."""


def find_launcher() -> Process | None:
    """torchrun of this rank, however many processes stand between; None under srun and without a launcher.

    A shell or a SLURM daemon may end before the run does, so only torchrun is looked for.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    pid: int | None = os.getppid()
    while pid:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return None
        if not any(variable.startswith(_MARK) for variable in variables):
            return Process.running(pid)
        pid = parent_of(pid)
    return None
