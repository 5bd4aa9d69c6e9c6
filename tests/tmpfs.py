"""A small file system for tests of full and read-only disks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, *, options: str) -> Iterator[Path]:
    """Mount a tmpfs on a new folder, and unmount it in the end; skip the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        # A process that is about to end may still have a file open there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
