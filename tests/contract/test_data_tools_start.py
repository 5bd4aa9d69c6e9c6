"""Every program of data_tools starts as a file, whatever the current folder is."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data_tools"
PROGRAMS = sorted(path.name for path in FOLDER.glob("*.py") if path.is_file() and "__main__" in path.read_text())
TIMEOUT_S = 1800


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_shows_its_help_from_any_folder(program: str, tmp_path: Path) -> None:
    for path, cwd in ((f"data_tools/{program}", ROOT), (str(FOLDER / program), tmp_path)):
        shown = run(path, "--help", cwd=cwd)
        assert shown.returncode == 0 and "usage:" in shown.stdout, shown.stderr
        assert "default: None" not in shown.stdout


def test_old_name_answers_with_the_new_one(tmp_path: Path) -> None:
    answer = run(str(FOLDER / "inspect.py"), "runs/shards", "--html", "page.html", cwd=tmp_path)
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
    assert "data_tools/view.py" in answer.stderr


def test_old_name_does_not_shadow_the_standard_library() -> None:
    """The folder of a program comes first in its search path, and `dataclasses` imports a module of this name."""
    assert PathFinder.find_spec("inspect", [str(FOLDER)]) is None
    assert PathFinder.find_spec("view", [str(FOLDER)]) is not None
