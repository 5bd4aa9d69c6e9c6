"""Forks programs from one process that has torch and megatron-core imported, which takes seconds in every other start.

`Engine` is the side of the runner, and `python -m launch.ablations.engine` the process that forks. It reads one JSON
line for each program, `{"id", "module", "words", "log"}`, or a signal for all, `{"signal": NUMBER}`. In place of a
module there may be a `command` with its `environment`: a launch script. It answers with `{"id", "code"}` when a program
has ended; the code of a killed one is minus the signal.

Where its standard input ends, because the runner is gone however that came, it kills its programs and ends. The kernel
kills them where this process is killed itself. A launch script gets SIGTERM in place of SIGKILL, and SIGINT from the
user, because it has ranks to end.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.bench.programs import ROOT, environment, python
from megavl.config.errors import PeerError

_IMPORTED = ("torch._dynamo", "megavl.train.loop", "megavl.checkpoint.writer", "megavl.convert.start_weights")
_TICK_S = 0.05
_PR_SET_PDEATHSIG = 1
_NOT_STARTED = 127
"""Code of a command that is not there, as of a shell."""


class Engine:
    """A process that forks programs; started with the first of them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def start(self, name: str, module: str, words: Sequence[str], *, log: Path) -> None:
        """Start `python -m module words`; its output is appended to `log`."""
        self._write({"id": name, "module": module, "words": list(words), "log": str(log)})

    def run(self, name: str, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        """Start another command, with these variables alone."""
        self._write({"id": name, "command": list(command), "environment": dict(environment), "log": str(log)})

    def signal(self, number: int) -> None:
        """Send a signal to every program that runs."""
        if self._process is not None:
            self._write({"signal": number})

    def ended(self) -> dict[str, int]:
        """Codes of the programs that have ended since the last call.

        Raises:
            PeerError: the process itself is gone.
        """
        if self._process is None or self._process.stdout is None:
            return {}
        while select.select([self._process.stdout], [], [], 0)[0]:
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                raise self._gone()
            self._unread += read
        *lines, self._unread = self._unread.split(b"\n")
        return {row["id"]: row["code"] for row in map(json.loads, lines)}

    def close(self) -> None:
        """End the process, and with it what still runs."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _write(self, message: dict[str, Any]) -> None:
        if self._process is None:
            # In a session of its own it does not get the terminal's Ctrl-C: the runner passes signals on.
            self._process = subprocess.Popen(
                [python(), "-W", "ignore", "-m", "launch.ablations.engine"],
                cwd=ROOT,
                env=environment(gpu=_has_gpu()),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        assert self._process.stdin is not None, "it was opened as a pipe"
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def _gone(self) -> PeerError:
        code = self._process.wait() if self._process else None
        return PeerError(f"the process that starts the runs is gone, code {code}; the same command goes on")


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/gpus").is_dir() and os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""


def main() -> None:
    """Import, then fork a program for each line; a forked child returns from here as that program."""
    from megavl.parallel.first_import import import_engine

    import_engine()
    for name in _IMPORTED:
        __import__(name)
    assert threading.active_count() == 1, "a fork would lose a thread"
    # What was imported is never collected, and its pages stay shared.
    gc.collect()
    gc.freeze()
    request = _serve()
    if request is not None:
        sys.argv[1:] = request["words"]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _serve() -> dict[str, Any] | None:
    """Fork for each request. Returns the request in a child, and None in this process at the end."""
    running: dict[int, dict[str, Any]] = {}
    unread = b""
    while True:
        if select.select([0], [], [], _TICK_S)[0]:
            read = os.read(0, 1 << 16)
            if not read:
                return _end(running)
            *lines, unread = (unread + read).split(b"\n")
            for request in map(json.loads, lines):
                if "signal" in request:
                    number = request["signal"]
                    # Ctrl-C has come twice where the runner says kill.
                    _signal(running, number, of_command=signal.SIGINT if number == signal.SIGKILL else number)
                elif (pid := os.fork()) == 0:
                    _become_child(request)
                    if "command" in request:
                        _become_command(request)
                    return request
                else:
                    running[pid] = request
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            row = {"id": running.pop(pid)["id"], "code": os.waitstatus_to_exitcode(status)}
            try:
                os.write(1, json.dumps(row).encode() + b"\n")
            except OSError:
                return _end(running)


def _end(running: Mapping[int, dict[str, Any]]) -> None:
    """Kill what runs, because the runner is gone; all but launch scripts have ended then."""
    _signal(running, signal.SIGKILL, of_command=signal.SIGTERM)
    for pid, request in running.items():
        if "command" not in request:
            os.waitpid(pid, 0)


def _signal(running: Mapping[int, dict[str, Any]], number: int, *, of_command: int) -> None:
    for pid, request in running.items():
        os.kill(pid, of_command if "command" in request else number)


def _become_child(request: dict[str, Any]) -> None:
    """Nothing to read, its own log, and an end with this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM if "command" in request else signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number, descriptor in enumerate((nothing, log, log)):
        os.dup2(descriptor, number)
    os.closerange(3, 1 << 16)


def _become_command(request: dict[str, Any]) -> NoReturn:
    try:
        os.execvpe(request["command"][0], request["command"], request["environment"])
    except OSError as error:
        os.write(2, f"error: {request['command'][0]}: {error.strerror}\n".encode())
        os._exit(_NOT_STARTED)


if __name__ == "__main__":
    main()
