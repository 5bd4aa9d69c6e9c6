"""launch/Dockerfile: its steps can be read, they copy what is there, and hadolint finds nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from launch.bench.engines.dockerfile import Step, kept, steps


@pytest.fixture(scope="module")
def found(root: Path) -> list[Step]:
    return steps((root / "launch/Dockerfile").read_text())


@pytest.fixture(scope="module")
def context(root: Path) -> list[str]:
    """Files that a build gets: of the folders that are no one's caches, and some that a user may have beside them."""
    folders = ("megavl", "data_tools", "launch", "tests", ".ci")
    inside = [path for folder in folders for path in (root / folder).rglob("*")]
    files = [path.relative_to(root).as_posix() for path in (*root.iterdir(), *inside) if path.is_file()]
    theirs = [".env", ".git/config", ".venv/bin/python", "data/a/manifest.json", "runs/a/checkpoints/x", "wandb/run"]
    return kept([*files, *theirs], (root / ".dockerignore").read_text())


def test_hadolint_is_clean(root: Path) -> None:
    command = [str(Path(sys.executable).parent / "hadolint"), "--no-color", str(root / "launch/Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_context_is_the_product_alone(context: list[str]) -> None:
    tops = {path.split("/")[0] for path in context}
    assert tops == {"LICENSE", "Makefile", "README.md", "data_tools", "launch", "megavl", "pyproject.toml", "setup.py"}
    assert not [path for path in context if path.endswith(".pyc")]
    assert {"megavl/data/batch.py", "launch/recipes/tiny/stage1.yaml", "data_tools/viewer/packed_page.css"} <= {
        *context
    }


def test_copied_files_are_in_the_context(found: list[Step], context: list[str]) -> None:
    copied = [source for step in found if step.word == "COPY" for source in step.words()[:-1]]
    assert copied[-1] == "." and len(copied) > 5
    assert [source for source in copied[:-1] if source not in context] == []


def test_extras_are_those_of_setup(found: list[Step], root: Path) -> None:
    call = next(
        node
        for node in ast.walk(ast.parse((root / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "extras_require"
    )
    assert isinstance(call.value, ast.Dict)
    known = {key.value for key in call.value.keys if isinstance(key, ast.Constant)}
    (given,) = [step.text for step in found if step.text.startswith("EXTRAS=")]
    assert set(given.removeprefix("EXTRAS=").split(",")) <= known


def test_the_user_need_not_install_again(found: list[Step]) -> None:
    everything = next(number for number, step in enumerate(found) if step.text == ". .")
    assert found[everything + 1].text.startswith("touch .venv/.megavl-installed ")


def test_setup_comes_before_the_code_and_root_ends(found: list[Step]) -> None:
    words = [step.word for step in found]
    setup = next(number for number, step in enumerate(found) if "make setup" in step.text)
    everything = next(number for number, step in enumerate(found) if step.text == ". .")
    assert setup < everything < words.index("USER")
    assert words[-3:] == ["USER", "ENTRYPOINT", "CMD"] and found[-3].text not in ("root", "0")
