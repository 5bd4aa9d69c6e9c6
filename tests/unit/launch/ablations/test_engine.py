"""The process that forks programs: its end, and the end of its programs with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.ablations import engine
from launch.ablations.engine import Engine
from megavl.config.errors import PeerError
from tests.tiny_run import PATIENCE_S


def test_dead_process_is_a_lost_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "python", lambda: "false")
    programs = Engine()
    end = time.monotonic() + PATIENCE_S
    with pytest.raises(PeerError, match="the process that starts the runs is gone, code 1"):
        while time.monotonic() < end:
            programs.start("x", "module", [], log=tmp_path / "log")
    programs.close()


def test_end_returns_when_programs_are_gone() -> None:
    process = subprocess.Popen(["sleep", "3600"])
    engine._end({process.pid: {"module": "x"}})
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, 0)
    process.wait()


def wait_for(path: Path) -> str:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"no {path} after {PATIENCE_S} s")


def test_programs_end_with_a_killed_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
    (tmp_path / "sleeper.py").write_text(code + "time.sleep(3600)\n")
    script = 'trap "echo $WORD >ended; exit" TERM; echo yes >began; while :; do sleep 0.1; done'
    programs = Engine()
    variables = {"PATH": os.environ["PATH"], "WORD": "saved"}
    command = ["bash", "-c", f"cd {tmp_path}; {script}"]
    programs.run("script", command, log=tmp_path / "log", environment=variables)
    programs.start("sleeper", "sleeper", [], log=tmp_path / "log")
    pid = int(wait_for(tmp_path / "pid"))
    wait_for(tmp_path / "began")
    assert programs._process is not None
    os.kill(programs._process.pid, signal.SIGKILL)
    assert wait_for(tmp_path / "ended") == "saved\n"
    end = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{pid}").is_dir() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, "the program outlives the process that forked it"
        time.sleep(0.05)
    programs.close()
