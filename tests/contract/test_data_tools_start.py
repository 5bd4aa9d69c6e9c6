"""Every program of data_tools starts as a file, from where its own folder shadows modules of the standard library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path.name for path in (ROOT / "data_tools").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("program", PROGRAMS)
def test_shows_its_help(program: str) -> None:
    command = [sys.executable, f"data_tools/{program}", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0 and "usage:" in run.stdout, run.stderr
