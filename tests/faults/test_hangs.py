"""Joining, data and weights that never end: every rank leaves by itself, with one message and a code.

The bound of `parallel.timeout_s` + 20 s is reported. A test allows minutes, since the machine may be busy.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import PATIENCE_S, ROOT, environment, forked, free_port, train_command

TIMEOUT_S = 6
BOUND_S = 300


class Ranks:
    """Two ranks of `megavl train` without a launcher."""

    def __init__(self, dataset: Path, run: Path, *overrides: str, port: int, only: tuple[int, ...] = (0, 1)) -> None:
        self.run, env = run, forked(environment())
        self.began = time.monotonic()
        command = train_command(dataset, run, "parallel.tensor=2", "parallel.pipeline=1", *overrides, processes=2)
        words = command[command.index("megavl") :]
        self.processes = {}
        for rank in only:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            variables = {**env, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in world.items()}}
            self.processes[rank] = subprocess.Popen(
                [env["PYTHON_EXEC"], "-m", *words, "parallel.layout=auto", f"parallel.timeout_s={TIMEOUT_S}"],
                cwd=ROOT,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def wait(self) -> tuple[dict[int, int], dict[int, str], float]:
        """Codes and output by rank, and the seconds until the last left."""
        printed = {rank: process.communicate(timeout=PATIENCE_S)[0] for rank, process in self.processes.items()}
        return {rank: process.returncode for rank, process in self.processes.items()}, printed, self.seconds()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "exit_status.json").read_text())
        return found


def check_ends(ranks: Ranks, codes: set[int], report_table: Any) -> None:
    found, printed, seconds = ranks.wait()
    report_table(f"codes {found} after {seconds:.1f} s; limit of the promise {TIMEOUT_S + 20} s after the start")
    assert set(found.values()) <= codes and seconds < BOUND_S, printed
    assert not any("Traceback" in text for text in printed.values()), printed
    assert ranks.status()["code"] in codes


@contextlib.contextmanager
def stranger(reply: bytes) -> Iterator[int]:
    """A listener that is no rank: it accepts, says `reply`, and keeps every connection open."""
    with socket.socket() as listener, contextlib.ExitStack() as kept:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    kept.enter_context(connection)
                    connection.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100], ids=["silent", "garbage"])
def test_a_stranger_on_the_port(dataset: Path, tmp_path: Path, reply: bytes, report_table: Any) -> None:
    with stranger(reply) as port:
        ranks = Ranks(dataset, tmp_path, port=port)
        check_ends(ranks, {7}, report_table)
    assert "join" in ranks.status()["reason"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_never_comes(dataset: Path, tmp_path: Path, rank: int, report_table: Any) -> None:
    check_ends(Ranks(dataset, tmp_path, port=free_port(), only=(rank,)), {7}, report_table)


def test_a_peer_dies_while_joining(dataset: Path, tmp_path: Path, report_table: Any) -> None:
    port = free_port()
    ranks = Ranks(dataset, tmp_path, port=port)
    # A rank is joining when the store of rank 0 listens.
    while ranks.processes[0].poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.01)
    ranks.processes.pop(1).kill()
    check_ends(ranks, {7}, report_table)


@pytest.mark.parametrize("file", ["manifest.json", "*.tokens.bin", "*.images.bin", "*.tokens.idx"])
def test_data_that_never_end(dataset: Path, tmp_path: Path, file: str, report_table: Any) -> None:
    shards = Path(shutil.copytree(dataset / "shards", tmp_path / "shards"))
    victim = next(shards.glob(file))
    victim.unlink()
    os.mkfifo(victim)
    ranks = Ranks(dataset, tmp_path / "run", f"data.sources=[{{path: {shards}}}]", port=free_port())
    check_ends(ranks, {3, 7}, report_table)


@pytest.fixture(scope="module")
def weights(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 1."""
    run = tmp_path_factory.mktemp("weights")
    ranks = Ranks(
        dataset, run, "training.steps=1", "parallel.timeout_s=600", "optimizer.warmup_steps=0", port=free_port()
    )
    codes, printed, _ = ranks.wait()
    assert set(codes.values()) == {0}, printed
    return run / "checkpoints" / "iter_0000001"


@pytest.mark.parametrize("file", ["manifest.json", "common.pt", "__0_0.distcp", ".metadata"])
def test_weights_that_never_end(dataset: Path, tmp_path: Path, weights: Path, file: str, report_table: Any) -> None:
    copied = Path(shutil.copytree(weights, tmp_path / "weights" / weights.name))
    (copied / file).unlink()
    os.mkfifo(copied / file)
    ranks = Ranks(dataset, tmp_path / "run", f"checkpoint.init={copied}", port=free_port())
    check_ends(ranks, {4, 7}, report_table)
