"""Separate processes for work on input from others: with limits always, and shut off from the machine for foreign code.

`run_limited` bounds time, memory, file size and output of a program of ours that handles foreign data. With
`isolated=True` bubblewrap also takes away the network, all other processes, and every file but the read-only
installation of Python, and the process can start no other and get no memory that the limits do not count: that is what
foreign code needs. README.md says what remains.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from data_tools.corpus.pairs.system_calls import filter_problem, filter_program
from megavl.config.errors import UsageError

PYTHON = os.path.join(sys.prefix, "bin", os.path.basename(sys.executable))
"""This interpreter, by the path below which its packages are found."""
INSIDE = "/sandbox"
"""Working folder of an isolated process: in memory, empty at the start, gone at the end."""
NOBODY = 65534
_MESSAGE = 4000
"""Bytes kept of standard error."""
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    # One process is one core's work, and numerical libraries may not start threads where processes are limited.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
}


Ending = Literal["exit", "time", "output"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one process; whichever is reached first ends it."""

    seconds: float
    """Wall clock; the whole process group is killed then."""
    cpu_seconds: int
    memory: int
    """Bytes of address space (of each process, where it may start others)."""
    file_size: int
    """Bytes of any one file."""
    output: int
    """Bytes of standard output."""
    processes: int | None = None
    """Of the user, threads included, outside isolation (the kernel exempts root); in isolation there is one process."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a process ended."""

    ended: Ending
    """By itself, or killed for its time or for writing too much."""
    code: int
    output: bytes
    message: str
    """Beginning of standard error."""

    @property
    def good(self) -> bool:
        """Whether it ended by itself with code 0."""
        return self.ended == "exit" and self.code == 0


def run_limited(
    command: Sequence[str],
    *,
    request: bytes,
    limits: Limits,
    folder: Path | None = None,
    isolated: bool = False,
    files: Mapping[str, Path] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a program until it ends or reaches a limit; nothing of it survives the call.

    Args:
        command: program and arguments.
        request: its standard input.
        limits: bounds.
        folder: working folder outside isolation; a process in isolation has one of its own in memory.
        isolated: shut it off with bubblewrap; call `check_isolation` once before.
        files: read-only files and folders of an isolated process, by their path inside.
        environment: variables beyond the few that every process gets.

    Raises:
        UsageError: `prlimit` of util-linux is missing.
    """
    variables = {**_ENVIRONMENT, "HOME": INSIDE if isolated else str(folder or "/nonexistent"), **(environment or {})}
    full = [*_prlimit(limits, isolated=isolated), *command]
    with _filter() if isolated else nullcontext(-1) as handle:
        if isolated:
            options = _bubblewrap(files=files or {}, memory=limits.file_size, variables=variables, calls=handle)
            full = [*options, *full]
        process = subprocess.Popen(
            full,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/" if isolated else folder,
            env=variables,
            start_new_session=True,
            pass_fds=(handle,) if isolated else (),
        )
    output, message = bytearray(), bytearray()
    try:
        ended = _talk(process, request=request, limits=limits, output=output, message=message)
    finally:
        _end(process)
    return Outcome(
        ended=ended, code=process.returncode, output=bytes(output), message=message.decode("utf-8", "replace")
    )


@cache
def isolation_problem() -> str | None:
    """Why processes cannot be isolated here; None when they can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed (Debian: apt install bubblewrap)"
    if problem := filter_problem():
        return problem
    limits = Limits(seconds=60, cpu_seconds=30, memory=4 << 30, file_size=1 << 20, output=1000)
    probe = run_limited([PYTHON, "-I", "-c", "print(1)"], request=b"", limits=limits, isolated=True)
    if probe.good and probe.output.strip() == b"1":
        return None
    return f"bubblewrap does not work here ({probe.message.strip()[:300] or probe.ended})"


def bind_system() -> list[str]:
    """Bubblewrap options that show the system's programs and libraries, read-only, and nothing of any user."""
    options = ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            options += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            options += ["--ro-bind", name, name]
    for name in ("/etc/ld.so.cache", "/etc/fonts", "/etc/alternatives"):
        options += ["--ro-bind-try", name, name]
    return options


def _prlimit(limits: Limits, *, isolated: bool) -> list[str]:
    program = shutil.which("prlimit")
    if program is None:
        raise UsageError("prlimit is not installed, so processes cannot be limited; install util-linux")
    options = [f"--cpu={limits.cpu_seconds}", f"--as={limits.memory}", f"--fsize={limits.file_size}", "--core=0"]
    if limits.processes is not None and not isolated:
        options.append(f"--nproc={limits.processes}")
    return [program, *options, "--"]


@contextmanager
def _filter() -> Iterator[int]:
    """A pipe from which bubblewrap reads the filter of system calls."""
    reading, writing = os.pipe()
    try:
        os.write(writing, filter_program())  # far less than a pipe holds
        os.close(writing)
        yield reading
    finally:
        os.close(reading)


def _bubblewrap(*, files: Mapping[str, Path], memory: int, variables: Mapping[str, str], calls: int) -> list[str]:
    options = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    options += ["--uid", str(NOBODY), "--gid", str(NOBODY), *bind_system()]
    # Before what lies below them, which they would hide.
    options += ["--size", str(memory), "--tmpfs", INSIDE, "--size", str(memory), "--tmpfs", "/tmp"]
    # Python and its packages, wherever they are installed.
    shown = {sys.prefix, sys.base_prefix, *(path for path in sys.path if os.path.isdir(path) and "-packages" in path)}
    for path in sorted(shown):
        if not f"{path}/".startswith("/usr/"):
            options += ["--ro-bind", path, path]
    for inside, outside in files.items():
        options += ["--ro-bind", str(outside), inside]
    for name, value in variables.items():
        options += ["--setenv", name, value]
    # What holds the mount points is memory without a bound.
    options += ["--remount-ro", "/dev", "--remount-ro", "/"]
    return [*options, "--seccomp", str(calls), "--chdir", INSIDE, "--"]


def _talk(
    process: subprocess.Popen[bytes], *, request: bytes, limits: Limits, output: bytearray, message: bytearray
) -> Ending:
    """Write the request and read both outputs until the process ends or reaches a limit."""
    assert process.stdin and process.stdout and process.stderr
    deadline = time.monotonic() + limits.seconds
    left = memoryview(request)
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                if key.fileobj is process.stdin:
                    left = _write(key.fd, left)
                    if not left:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                block = os.read(key.fd, 1 << 16)
                if not block:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    output += block
                else:
                    message += block[: _MESSAGE - len(message)]
            if len(output) > limits.output:
                return "output"
            if time.monotonic() > deadline:
                return "time"
    # Not reaped here: until then the number of its group cannot pass to another process.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return "time"
        time.sleep(0.002)
    return "exit"


def _write(handle: int, left: memoryview) -> memoryview:
    try:
        return left[os.write(handle, left) :]
    except BrokenPipeError:
        return left[len(left) :]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process group, then reap."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.close()
