"""Servers in processes of their own, and what their clients send."""

from __future__ import annotations

import base64
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from tests.tiny_run import PATIENCE_S, ROOT, environment, forked, free_port


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running `megavl serve`."""

    process: subprocess.Popen[str]
    followers: list[subprocess.Popen[str]]
    """The processes of further ranks."""
    errors: Path
    """What all ranks print to standard error."""
    address: str
    """http://127.0.0.1:PORT."""

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

    def end(self, number: int) -> list[int]:
        """The exit code of every rank after a signal to all of them."""
        for process in (self.process, *self.followers):
            process.send_signal(number)
        return [process.wait(PATIENCE_S) for process in (self.process, *self.followers)]


@contextmanager
def serving(model: Path, *words: str, ranks: int = 1) -> Iterator[Server]:
    """A server on a free port of this machine; what still runs at the end is killed."""
    env = forked(environment())
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    command = [env["PYTHON_EXEC"], "-m", "megavl", "serve", str(model), "--device", "cpu", "--port", "0", *words]
    errors = model.parent / f"errors-{time.monotonic_ns()}.txt"
    processes = []
    for rank in range(ranks):
        own = {**env, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        out = subprocess.DEVNULL if rank else subprocess.PIPE
        with errors.open("a") as stderr:
            variables = own if ranks > 1 else env
            processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=stderr, text=True))
    try:
        assert processes[0].stdout is not None
        line = processes[0].stdout.readline()
        found = re.search(r" at (http://\S+) ", line)
        assert found, line + errors.read_text()[-3000:]
        yield Server(process=processes[0], followers=processes[1:], address=found[1], errors=errors)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def question(text: str, *images: str) -> list[dict[str, Any]]:
    """The messages of one question about images, which come first."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def wait_until(what: Callable[[], bool]) -> None:
    """Return when it is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)
