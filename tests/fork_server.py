"""Python processes that begin with torch, megatron-core and MegaVL imported, which takes 5 s of a core in each other.

`python()` is an executable that takes the arguments of `python`. It asks a server, started at the first call, to fork.
The child runs the module, script or code as `__main__`, with the caller's arguments, environment, folder and standard
streams. Exit status and signals pass through. A usual Python starts instead where an option is not known to
`fork_client`, or a variable of `STATE` differs from the server's.

A test that looks at the processes themselves, or suspends one, needs `sys.executable`: the caller sees the client, and
its child belongs to the server.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavl.parallel.first_import import import_engine

ROOT = Path(__file__).resolve().parents[1]
STATE = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "PYTHONUTF8")
"""Variables that Python or torch read at their start."""
IMPORTED = (
    "torch._dynamo",
    "torch.distributed.run",
    "megavl.train.loop",
    "megavl.generate.pretrained",
    "megavl.convert.native_format",
)


def python(environment: Mapping[str, str]) -> str:
    """An executable in place of `sys.executable`, for processes with this environment."""
    return _start(tuple(environment.get(name) for name in STATE))


@functools.cache
def _start(state: tuple[str | None, ...]) -> str:
    folder = tempfile.TemporaryDirectory(prefix="megavl-forks-")
    needed = dict(zip(STATE, state, strict=True))
    variables = {**os.environ, **needed}
    path = Path(folder.name) / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(128)
    # It ends when its standard input does, so with this process, however that ends.
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.fork_server", str(listener.fileno())],
        cwd=ROOT,
        env={name: value for name, value in variables.items() if value is not None},
        stdin=subprocess.PIPE,
        pass_fds=[listener.fileno()],
    )
    listener.close()
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)
    client = Path(folder.name) / "python"
    words = [sys.executable, "-IS", str(Path(__file__).with_name("fork_client.py")), str(path), json.dumps(needed)]
    client.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    client.chmod(0o700)
    return str(client)


def _serve(listener: socket.socket) -> dict[str, Any]:
    """Fork a process for each request. Returns the request in the child."""
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ)
    ready.register(0, selectors.EVENT_READ)
    running: dict[int, tuple[int, int]] = {}  # by file descriptor of either, a process and its client's connection
    while True:
        for key, _ in ready.select():
            if key.fd == 0:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                request, streams, connection = _accept(listener)
                if (pid := os.fork()) == 0:
                    ready.close()
                    listener.close()
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                    os.closerange(3, 1 << 16)
                    return request
                for stream in streams:
                    os.close(stream)
                os.write(connection, b"%d\n" % pid)
                end = os.pidfd_open(pid)
                for descriptor in (end, connection):
                    running[descriptor] = pid, connection
                    ready.register(descriptor, selectors.EVENT_READ)
            elif key.fd in running:
                _finish(key.fd, running=running, ready=ready)


def _accept(listener: socket.socket) -> tuple[dict[str, Any], list[int], int]:
    connection, _ = listener.accept()
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline()), streams, connection.detach()


def _finish(descriptor: int, *, running: dict[int, tuple[int, int]], ready: selectors.BaseSelector) -> None:
    """The process has ended, or its client was killed and takes it along."""
    pid, connection = running[descriptor]
    if descriptor == connection:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if descriptor != connection:
        os.write(connection, b"%d\n" % os.waitstatus_to_exitcode(status))
    for other in [other for other, pair in running.items() if pair[0] == pid]:
        ready.unregister(other)
        os.close(other)
        del running[other]


def _become(request: dict[str, Any]) -> None:
    """Run what the client was called with, as Python does after its start."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["unbuffered"]:
        # Line by line: write_through alone would leave it in the buffer of bytes.
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for action in request["warnings"]:
        warnings.simplefilter(action)
    sys.warnoptions[:] = request["warnings"]
    kind, what, sys.argv[1:] = request["kind"], request["what"], request["arguments"]
    sys.path[0] = str(Path(what).resolve().parent) if kind == "script" else request["folder"]
    if kind == "module":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "script":
        sys.argv[0] = what
        runpy.run_path(what, run_name="__main__")
    else:
        sys.argv[0] = "-c"
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))


def main() -> None:
    """Import, then fork until standard input ends."""
    import_engine()
    for name in IMPORTED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose a thread"
    # What was imported is never collected, and its pages stay shared.
    gc.collect()
    gc.freeze()
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
