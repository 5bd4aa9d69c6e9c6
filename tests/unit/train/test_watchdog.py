"""The watchdog ends a rank whose collective never returns."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.supervise.watchdog import Watchdog
from tests.tiny_run import ROOT, environment, forked

HANGS = """
import os, sys, time
from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.supervise.watchdog import Watchdog
status = ExitStatus(sys.argv[1], rank=1)
def leave(code, reason):
    status.write(code, reason)
    print(reason, flush=True)
    os._exit(code)
Watchdog(status, timeout_s=0.5, leave=leave, period_s=0.1).start()
status.step, status.section = 7, "training"
time.sleep(1800)
"""


class Watched:
    """A watchdog on a clock that only the test moves."""

    def __init__(self, status: ExitStatus, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, str]] = []
        self.now, self.reads = 0.0, 0
        monkeypatch.setattr("megavl.train.supervise.watchdog.time", self)
        self.watchdog = Watchdog(
            status, leave=lambda *call: self.calls.append(call), timeout_s=60.0, grace_s=15.0, period_s=0.01
        )
        self.watchdog.start()

    def monotonic(self) -> float:
        self.reads += 1
        return self.now

    def pass_time(self, seconds: float) -> None:
        """Move the clock, and wait until the watchdog has looked at it."""
        self.now += seconds
        enough = self.reads + 2
        while self.reads < enough and self.watchdog.is_alive():
            time.sleep(0.005)

    def stop(self) -> list[tuple[int, str]]:
        self.watchdog.stop()
        self.watchdog.join()
        return self.calls


@pytest.fixture
def status(tmp_path: Path) -> ExitStatus:
    return ExitStatus(tmp_path, rank=1)


def test_hung_process_leaves_with_code_7(tmp_path: Path) -> None:
    env = forked(environment())
    command = [env["PYTHON_EXEC"], "-c", HANGS, tmp_path]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 7, done.stderr
    assert "rank 1 made no progress" in done.stdout and "step 7 while training" in done.stdout
    assert '"code": 7' in (tmp_path / "exit_status.json").read_text()


def test_steps_with_progress_continue(status: ExitStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    status.section = "training"
    watched = Watched(status, monkeypatch)
    for step in range(12):
        status.step = step
        watched.pass_time(50)
    assert watched.stop() == []


def test_saving_may_take_longer_than_a_step(status: ExitStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    status.section = "saving"
    watched = Watched(status, monkeypatch)
    watched.pass_time(1000)
    assert watched.stop() == []


def test_a_peer_that_recorded_its_end_is_named(status: ExitStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    status.step, status.section = 3, "training"
    watched = Watched(status, monkeypatch)
    ExitStatus(status.path.parent, rank=0).write(5, "no space")
    watched.pass_time(1)
    watched.pass_time(20)
    calls = watched.stop()
    assert [code for code, _ in calls] == [7]
    assert "at step 3 while training" in calls[0][1] and "rank 0 had left with code 5: no space" in calls[0][1]


def test_status_of_an_earlier_run_is_ignored(status: ExitStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    ExitStatus(status.path.parent, rank=0).write(7, "earlier")
    status.section = "joining the process group"
    watched = Watched(status, monkeypatch)
    watched.pass_time(1000)
    status.clear()
    status.section = "training"
    watched.pass_time(50)
    assert watched.stop() == []
