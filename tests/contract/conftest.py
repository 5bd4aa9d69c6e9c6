"""What the contract tests read: the repository's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megavl", "data_tools", "launch", "tests")


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def project_files() -> list[Path]:
    """Every file of the project's folders, and the plain files beside them."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files = [path for path in (*ROOT.iterdir(), *inside, ROOT / ".ci" / "run") if path.is_file()]
    return sorted(path for path in files if "__pycache__" not in path.parts and path.suffix != ".pyc")


@pytest.fixture(scope="session")
def python_files(project_files: list[Path]) -> list[Path]:
    """Every Python file of the project."""
    return [path for path in project_files if path.suffix == ".py"]
