"""Clients of MegaVL's models and servers, each in an environment of its own that `make test-clients` makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.tiny_run import PATIENCE_S


def interpreter(variable: str, package: str) -> str:
    """The interpreter that an environment variable names; without it the test is skipped."""
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{variable} names no interpreter that has {package}; make test-clients runs it")
    return found


def run(command: list[str], *, text: str = "", cwd: Path | None = None, **variables: str) -> str:
    """Standard output of a program that finds nothing of ours in its path and ends with 0."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**environment, **variables},
        input=text,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
