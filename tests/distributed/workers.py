"""Processes of one test that depend on each other."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.tiny_run import PATIENCE_S, environment


def run_workers(
    commands: Sequence[Sequence[str]], *, logs: Path, progress: Callable[[], object], patience_s: float = PATIENCE_S
) -> None:
    """Run processes to their end; where one fails or all stand still, the others are killed at once.

    Args:
        commands: one for each process.
        logs: folder for what they print, `0.log` and so on.
        progress: something that changes as they get on.
        patience_s: how long it may stay the same.
    """
    files = [logs / f"{index}.log" for index in range(len(commands))]
    workers = []
    for command, file in zip(commands, files):
        with file.open("w") as out:
            workers.append(subprocess.Popen(command, env=environment(), stdout=out, stderr=subprocess.STDOUT))
    try:
        seen, since, still = progress(), time.monotonic(), False
        while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
            time.sleep(0.2)
            if (now := progress()) != seen:
                seen, since = now, time.monotonic()
            if still := time.monotonic() - since > patience_s:
                break
        failed = {index: worker.returncode for index, worker in enumerate(workers) if worker.poll()}
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
    # Of all: one that lost its peer may fail before the one that caused it.
    # torch puts `[rank0]: ` before each line once for every process group that was ever started.
    printed = [re.sub(r"(\[rank\d+\]: )+", r"\1", file.read_text()) for file in files]
    told = "\n".join(f"process {index}:\n{text[-3000:]}" for index, text in enumerate(printed))
    assert not failed, f"exit codes {failed}\n{told}"
    assert not still, f"no progress for {patience_s:g} s at {seen}\n{told}"
