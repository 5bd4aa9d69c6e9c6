"""Joining, data and weights that never end: every rank leaves by itself, with one message and a code.

The bound of `parallel.timeout_s` + 20 s is reported. A test allows minutes, since the machine may be busy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.two_ranks import BOUND_S, Ranks
from tests.tiny_run import free_port

TIMEOUT_S = 6
SHORT = f"parallel.timeout_s={TIMEOUT_S}"


def check_ends(ranks: Ranks, codes: set[int], report_table: Any) -> None:
    found, printed, seconds = ranks.wait()
    report_table(f"codes {found} after {seconds:.1f} s; limit of the promise {TIMEOUT_S + 20} s after the start")
    assert set(found.values()) <= codes and seconds < BOUND_S, printed
    assert "Traceback" not in printed and printed.count("error: ") == 1, printed
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
        ranks = Ranks(dataset, tmp_path, SHORT, port=port)
        check_ends(ranks, {7}, report_table)
    assert "join" in ranks.status()["reason"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_peer_never_comes(dataset: Path, tmp_path: Path, rank: int, report_table: Any) -> None:
    check_ends(Ranks(dataset, tmp_path, SHORT, only=(rank,)), {7}, report_table)


def test_a_peer_dies_while_joining(dataset: Path, tmp_path: Path, report_table: Any) -> None:
    port = free_port()
    ranks = Ranks(dataset, tmp_path, SHORT, port=port)
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
    ranks = Ranks(dataset, tmp_path / "run", SHORT, f"data.sources=[{{path: {shards}}}]")
    check_ends(ranks, {3, 7}, report_table)


@pytest.fixture(scope="module")
def weights(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 1."""
    run = tmp_path_factory.mktemp("weights")
    ranks = Ranks(dataset, run, "training.steps=1", "optimizer.warmup_steps=0")
    codes, printed, _ = ranks.wait()
    assert set(codes.values()) == {0}, printed
    return run / "checkpoints" / "iter_0000001"


@pytest.mark.parametrize("file", ["manifest.json", "common.pt", "__0_0.distcp", ".metadata"])
def test_weights_that_never_end(dataset: Path, tmp_path: Path, weights: Path, file: str, report_table: Any) -> None:
    copied = Path(shutil.copytree(weights, tmp_path / "weights" / weights.name))
    (copied / file).unlink()
    os.mkfifo(copied / file)
    ranks = Ranks(dataset, tmp_path / "run", SHORT, f"checkpoint.init={copied}")
    check_ends(ranks, {4, 7}, report_table)
