"""Runs a program of ours on input from others, in a separate process with limits of time, memory and file size."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megavl.config.errors import UsageError

PYTHON = os.path.join(sys.prefix, "bin", os.path.basename(sys.executable))
"""This interpreter, at the path from which it finds its packages."""
_MAX_MESSAGE = 4000
"""Bytes of standard error that are kept."""
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    # One process uses one core; the caller runs several processes.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one process; the first one reached ends it."""

    seconds: float
    """Wall-clock time."""
    cpu_seconds: int
    memory: int
    """Bytes of address space."""
    file_size: int
    """Bytes of any one file, standard output included."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a process ended."""

    timed_out: bool
    code: int
    output: bytes
    message: str
    """Beginning of standard error."""

    @property
    def good(self) -> bool:
        """Whether the process ended in time with code 0."""
        return not self.timed_out and self.code == 0


def run_limited(command: Sequence[str], *, request: bytes, limits: Limits, folder: Path) -> Outcome:
    """Run a program until it ends or reaches a limit, then kill whatever it started.

    Args:
        command: program and arguments.
        request: standard input.
        limits: limits of the process.
        folder: working folder.

    Raises:
        UsageError: `prlimit` of util-linux is missing.
    """
    prlimit = shutil.which("prlimit")
    if prlimit is None:
        raise UsageError("prlimit is not installed, so processes cannot be limited; install util-linux")
    options = [f"--cpu={limits.cpu_seconds}", f"--as={limits.memory}", f"--fsize={limits.file_size}", "--core=0"]
    # The output goes to files, not pipes, so that the limit of file size holds for it too.
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as message:
        given.write(request)
        given.seek(0)
        process = subprocess.Popen(
            [prlimit, *options, "--", *command],
            stdin=given,
            stdout=output,
            stderr=message,
            cwd=folder,
            env={**_ENVIRONMENT, "HOME": str(folder)},
            start_new_session=True,
        )
        try:
            timed_out = not _ends_in_time(process, seconds=limits.seconds)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        message.seek(0)
        told = message.read(_MAX_MESSAGE).decode("utf-8", "replace")
        return Outcome(timed_out=timed_out, code=process.returncode, output=output.read(), message=told)


def _ends_in_time(process: subprocess.Popen[bytes], *, seconds: float) -> bool:
    """Wait for the process without reaping it, so that no other process group can get its id before the kill."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
