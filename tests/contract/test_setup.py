"""`make setup` installs once, and again where other extras are asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PIP = """#!/bin/sh
case "$*" in *--editable*) echo "${*##*--editable }" >>.venv/installed ;; esac
"""
OTHER = """#!/bin/sh
case "$*" in
  -c*) echo python-3.10 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *) echo "$0 $*" >>asked ;;
esac
"""
DEFAULT = "corpus,screens,"


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A checkout whose environment's interpreter only notes what it is to install."""
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(PIP)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    return tmp_path


def installed_by(checkout: Path, *words: str) -> list[str]:
    """Extras that `make` with these words installs, a call each."""
    log = checkout / ".venv/installed"
    log.unlink(missing_ok=True)
    subprocess.run(["make", "--silent", *words], cwd=checkout, capture_output=True, text=True, check=True)
    return [line.removeprefix(".[").removesuffix("]") for line in log.read_text().splitlines()] if log.exists() else []


def test_setup_installs_once(checkout: Path) -> None:
    (first,) = installed_by(checkout, "setup")
    assert first.startswith(DEFAULT)
    assert installed_by(checkout, "setup") == [] and installed_by(checkout, "demo") == []


def test_other_extras_are_installed(checkout: Path) -> None:
    installed_by(checkout, "setup")
    assert installed_by(checkout, "setup", "EXTRAS=lm-eval") == ["lm-eval"]
    assert installed_by(checkout, "setup", "EXTRAS=lm-eval") == []
    # Other targets take what is there; setup alone means all.
    assert installed_by(checkout, "demo") == []
    (again,) = installed_by(checkout, "setup")
    assert again.startswith(DEFAULT) and installed_by(checkout, "demo") == []


def test_targets_install_chosen_extras_again(checkout: Path) -> None:
    assert installed_by(checkout, "setup", "EXTRAS=hf,serve") == ["hf,serve"]
    # Older than the Makefile; touching that might give both the same time.
    os.utime(checkout / ".venv/.megavl-installed", (1, 1))
    assert installed_by(checkout, "demo") == ["hf,serve"]


def test_a_stamp_of_an_earlier_version_counts_as_all(checkout: Path) -> None:
    (checkout / ".venv/.megavl-installed").touch()
    assert installed_by(checkout, "setup") == [] and installed_by(checkout, "setup", "EXTRAS=hf") == ["hf"]


def test_another_python_gets_its_own_environment(checkout: Path) -> None:
    python = checkout / "python3.10"
    python.write_text(OTHER)
    python.chmod(0o755)
    assert installed_by(checkout, "test-python", f"PYTHON={python}") == []
    install, quick, ranks = lines = (checkout / "asked").read_text().splitlines()
    assert all(line.startswith(".venv-clients/python-3.10/bin/python -m ") for line in lines)
    assert f"--editable .[{DEFAULT}" in install and "not processes tests/unit" in quick
    # Collected with tests/unit, these would be marked as its tests are.
    assert "tests/faults/" in ranks and "tests/unit" not in ranks
