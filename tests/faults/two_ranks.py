"""Two ranks of `megavl train` without a launcher, so that a test sees how each of them ends."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.tiny_run import PATIENCE_S, ROOT, environment, forked, free_port, train_command

TENSOR = ("parallel.tensor=2", "parallel.pipeline=1", "parallel.layout=auto")
BOUND_S = 300
"""Seconds that a test allows where `parallel.timeout_s` + 20 are promised: the machine may be busy."""


class Ranks:
    """The tiny recipe under tensor parallelism; `port` and `only` (ranks to start) spoil their meeting."""

    def __init__(
        self,
        dataset: Path,
        run: Path,
        *overrides: str,
        fault: str = "",
        port: int | None = None,
        only: tuple[int, ...] = (0, 1),
    ) -> None:
        self.run, env, port = run, forked(environment()), port or free_port()
        command = train_command(dataset, run, *TENSOR, *overrides, processes=2)
        words = command[command.index("megavl") :]
        self.began = time.monotonic()
        self.processes = {}
        for rank in only:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            variables = {
                "MASTER_ADDR": "127.0.0.1",
                "FAULT": fault,
                **{name: str(value) for name, value in world.items()},
            }
            self.processes[rank] = subprocess.Popen(
                [env["PYTHON_EXEC"], "-m", *words],
                cwd=ROOT,
                env={**env, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def wait(self) -> tuple[dict[int, int], str, float]:
        """Code by rank, all output, and the seconds from the start to the last end."""
        printed = "".join(process.communicate(timeout=PATIENCE_S)[0] for process in self.processes.values())
        codes = {rank: process.returncode for rank, process in self.processes.items()}
        return codes, printed, time.monotonic() - self.began

    def status(self) -> dict[str, Any]:
        """The exit status."""
        found: dict[str, Any] = json.loads((self.run / "exit_status.json").read_text())
        return found


def saved(run: Path) -> list[int]:
    """Iterations of the committed checkpoints; fails where an uncommitted one is left."""
    names = sorted(path.name for path in (run / "checkpoints").glob("iter_*"))
    assert not [name for name in names if ".tmp-" in name], names
    return [int(name.removeprefix("iter_")) for name in names]


def state_bytes(run: Path, step: int) -> dict[str, bytes]:
    """Files with weights, moments and step counts in a checkpoint; the recipe beside them names the run's folder."""
    folder = run / "checkpoints" / f"iter_{step:07d}"
    found = {name: (folder / name).read_bytes() for name in os.listdir(folder) if name.endswith((".distcp", ".pt"))}
    assert len(found) == 3 and any(b"exp_avg_sq" in (folder / ".metadata").read_bytes() for _ in found)
    return {**found, ".metadata": (folder / ".metadata").read_bytes()}
