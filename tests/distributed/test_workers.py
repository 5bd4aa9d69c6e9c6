"""Processes of one test: none outlives another's failure, and none may stand still."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.distributed.workers import run_workers

SLEEPS = [sys.executable, "-S", "-c", "import time; print('slept', flush=True); time.sleep(3600)"]
FAILS = [sys.executable, "-S", "-c", "print('this went wrong'); raise SystemExit(7)"]
ENDS = [sys.executable, "-S", "-c", "pass"]


def test_one_failure_ends_the_others(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)exit codes \{1: 7\}.*this went wrong"):
        run_workers([SLEEPS, FAILS], logs=tmp_path, progress=lambda: None)
    assert time.monotonic() - begun < 600


def test_no_progress_ends_all(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no progress for 0.5 s at 3"):
        run_workers([SLEEPS, ENDS], logs=tmp_path, progress=lambda: 3, patience_s=0.5)


def test_progress_is_worth_waiting_for(tmp_path: Path) -> None:
    sleeps = [sys.executable, "-S", "-c", "import time; time.sleep(1)"]
    run_workers([sleeps, ENDS], logs=tmp_path, progress=time.monotonic, patience_s=0.5)
