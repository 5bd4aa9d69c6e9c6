"""The watchdog ends a rank whose collective never returns."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from megavl.files.hashing import file_sha256
from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.supervise.signals import StopFlag
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

WAITS = """
import ctypes, os, signal, threading, time
from megavl.train.supervise.signals import StopFlag
stop = StopFlag()
stop.watch_interrupts()
def press():
    for count in (1, 2):
        os.kill(os.getpid(), signal.SIGINT)
        while stop.interrupts() < count:
            time.sleep(0.01)
    print(stop.interrupts(), flush=True)
    os._exit(0)
threading.Thread(target=press).start()
mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
for _ in range(2):
    library.pthread_mutex_lock(mutex)
"""


class Watched:
    """A watchdog on a clock that only the test moves."""

    def __init__(self, status: ExitStatus, monkeypatch: pytest.MonkeyPatch, *, stop: StopFlag | None = None) -> None:
        self.calls: list[tuple[int, str]] = []
        self.now, self.reads = 0.0, 0
        monkeypatch.setattr("megavl.train.supervise.watchdog.time", self)
        self.watchdog = Watchdog(
            status, leave=lambda *call: self.calls.append(call), timeout_s=60.0, stop=stop, grace_s=15.0, period_s=0.01
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


def test_a_save_that_writes_may_take_long(status: ExitStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    status.section = "saving"
    watched = Watched(status, monkeypatch)
    for piece in range(12):
        (status.path.parent / str(piece)).write_bytes(b"a piece")
        file_sha256(status.path.parent / str(piece))
        watched.pass_time(50)
    assert watched.stop() == []


@pytest.mark.parametrize(
    "section",
    [
        "start",
        "joining the process group",
        "opening the data",
        "checking the data",
        "loading weights",
        "evaluating",
        "saving",
        "leaving",
    ],
)
def test_every_section_that_waits_is_watched(status: ExitStatus, monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    status.section = section
    watched = Watched(status, monkeypatch)
    watched.pass_time(0)
    watched.pass_time(59)
    assert watched.calls == []
    watched.pass_time(3)
    calls = watched.stop()
    assert [code for code, _ in calls] == [7] and f"step 0 while {section}" in calls[0][1]


def test_building_a_model_may_take_long(status: ExitStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    status.section = "building the model"
    watched = Watched(status, monkeypatch)
    watched.pass_time(1000)
    assert watched.stop() == []


class Keyboard(StopFlag):
    """Ctrl-C as often as the test says."""

    pressed = 0

    def interrupts(self) -> int:
        return self.pressed


@pytest.mark.parametrize(("section", "needed"), [("loading weights", 1), ("training", 2), ("saving", 2)])
def test_ctrl_c_ends_what_no_step_would_end(
    status: ExitStatus, monkeypatch: pytest.MonkeyPatch, section: str, needed: int
) -> None:
    status.section = section
    keyboard = Keyboard()
    watched = Watched(status, monkeypatch, stop=keyboard)
    for count in range(needed):
        assert watched.calls == []
        keyboard.pressed = count + 1
        watched.pass_time(1)
    calls = watched.stop()
    assert [code for code, _ in calls] == [130] and section in calls[0][1]


def test_ctrl_c_is_counted_while_the_main_thread_waits() -> None:
    """In a lock that Python does not leave for a signal, as in a collective."""
    env = forked(environment())
    done = subprocess.run(
        [env["PYTHON_EXEC"], "-c", WAITS], env=env, cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.stdout == "2\n", done.stderr


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
    watched.pass_time(50)
    status.clear()
    status.section = "training"
    watched.pass_time(50)
    assert watched.stop() == []
