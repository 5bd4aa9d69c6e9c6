"""Every test that was written is also run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path


def test_every_test_file_is_collected(root: Path, python_files: list[Path]) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stdout[-3000:] + listed.stderr[-3000:]
    collected = {line.partition("::")[0] for line in listed.stdout.splitlines() if "::" in line}
    written = {str(path.relative_to(root)) for path in python_files if holds_tests(path, root)}
    assert written - collected == set()


def holds_tests(path: Path, root: Path) -> bool:
    """Whether a file below tests/ defines a test, whatever the file is called."""
    if path.relative_to(root).parts[0] != "tests":
        return False
    tree = ast.parse(path.read_text())
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return path.name.startswith("test_") or any(name.startswith(("test_", "Test")) for name in names)


def test_tests_live_in_the_known_folders(root: Path) -> None:
    known = {"unit", "distributed", "numerics", "faults", "end_to_end", "slurm", "contract"}
    found = {path.name for path in (root / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert found <= known
