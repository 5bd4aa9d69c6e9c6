"""Who owns a directory: the process, and what people need to find it."""

from __future__ import annotations

import datetime
import json
import os
import socket
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from megavl.files.process import Process

_LONGEST = 200


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that owns a directory, and what people need to find it."""

    process: Process
    launcher: Process | None
    """torchrun, if it started the process; if it is gone, the process leaves by itself."""
    host: str
    job: str
    """`SLURM job N` or `torchrun run ID`; empty outside both."""
    restarts: tuple[int, ...]
    """How often SLURM and torchrun have restarted the job."""
    since: str
    token: str
    """Differs for every owner."""

    @staticmethod
    def this_process(*, launcher: Process | None = None) -> Owner:
        """The calling process as an owner."""
        job, restarts = _job()
        return Owner(
            process=Process.this(),
            launcher=launcher,
            host=_plain(socket.gethostname()),
            job=_plain(job),
            restarts=restarts,
            since=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
            token=uuid4().hex,
        )

    def __str__(self) -> str:
        parts = (f"host {self.host}", f"pid {self.process.pid}", self.job, f"since {self.since}")
        return ", ".join(part for part in parts if part)

    def encode(self, beat: int) -> bytes:
        """Content of the file; its length does not depend on `beat`."""
        launcher = self.launcher
        row = {
            "host": self.host,
            "pid": self.process.pid,
            "started": self.process.started,
            "machine": self.process.machine,
            "launcher": [launcher.pid, launcher.started] if launcher else None,
            "job": self.job,
            "restarts": self.restarts,
            "since": self.since,
            "token": self.token,
        }
        return f'{json.dumps(row)[:-1]}, "beat": {beat:>12}}}\n'.encode()

    @staticmethod
    def decode(content: bytes) -> Owner | None:
        """The owner that a file names; None if it names none."""
        try:
            row = json.loads(content)
            machine = _text(row["machine"])
            launcher = row["launcher"]
            return Owner(
                process=Process(machine=machine, pid=_number(row["pid"]), started=_number(row["started"])),
                launcher=launcher and Process(machine=machine, pid=_number(launcher[0]), started=_number(launcher[1])),
                host=_text(row["host"]),
                job=_text(row["job"]),
                restarts=tuple(map(_number, row["restarts"])),
                since=_text(row["since"]),
                token=_text(row["token"]),
            )
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return None


def _job() -> tuple[str, tuple[int, ...]]:
    """Name of the job that this process belongs to, and how often it was restarted."""
    restarts = tuple(_count_of(name) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"SLURM job {job}", restarts
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return ("" if run == "none" else f"torchrun run {run}"), restarts


def _count_of(name: str) -> int:
    text = os.environ.get(name, "0")
    return int(text) if text.isdecimal() else 0


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST or not value.isprintable():
        raise ValueError("no text")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError("no number")
    return value


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:_LONGEST]
