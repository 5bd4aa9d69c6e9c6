"""The thread that ends a rank whose collective never returns."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.supervise.watchdog import Watchdog
from tests.tiny_run import ROOT, environment

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
time.sleep(60)
"""


class Left:
    """What the watcher asked for."""

    def __init__(self, status: ExitStatus, **settings: float) -> None:
        self.calls: list[tuple[int, str]] = []
        self.watcher = Watchdog(
            status, leave=lambda *call: self.calls.append(call), period_s=0.02, **{"timeout_s": 60.0, **settings}
        )
        self.watcher.start()

    def after(self, seconds: float) -> list[tuple[int, str]]:
        self.watcher.join(seconds)
        self.watcher.stop()
        self.watcher.join()
        return self.calls


@pytest.fixture
def status(tmp_path: Path) -> ExitStatus:
    return ExitStatus(tmp_path, rank=1)


def test_a_stuck_process_leaves_with_code_7_and_names_the_place(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 7, done.stderr
    assert "rank 1 made no progress" in done.stdout and "step 7 while training" in done.stdout
    assert '"code": 7' in (tmp_path / "exit_status.json").read_text()


def test_steps_that_go_on_are_left_alone(status: ExitStatus) -> None:
    status.section = "training"
    left = Left(status, timeout_s=0.3)
    for step in range(12):
        status.step = step
        time.sleep(0.05)
    assert left.after(0.0) == []


def test_saving_may_take_longer_than_a_step(status: ExitStatus) -> None:
    status.section = "saving"
    assert Left(status, timeout_s=0.1).after(0.4) == []


def test_a_peer_that_recorded_its_end_is_named(status: ExitStatus) -> None:
    status.step, status.section = 3, "training"
    left = Left(status, grace_s=0.1)
    ExitStatus(status.path.parent, rank=0).write(5, "no space")
    calls = left.after(10)
    assert [code for code, _ in calls] == [7]
    assert "at step 3 while training" in calls[0][1] and "rank 0 had left with code 5: no space" in calls[0][1]


def test_the_status_of_an_earlier_run_is_not_a_peer(status: ExitStatus) -> None:
    ExitStatus(status.path.parent, rank=0).write(7, "earlier")
    status.section = "joining the process group"
    left = Left(status, grace_s=0.05)
    time.sleep(0.2)
    status.clear()
    status.section = "training"
    assert left.after(0.3) == []
