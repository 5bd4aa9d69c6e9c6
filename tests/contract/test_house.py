"""The shape of the house: names, sizes, and what stands at the top."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
CATCH_ALL_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
LIBRARIES = {
    "datasets", "hypothesis", "megatron", "mypy", "numpy", "PIL", "psutil", "pydantic", "pytest", "ruff",
    "safetensors", "sentencepiece", "tensorboard", "tokenizers", "torch", "tqdm", "transformers", "yaml",
}  # fmt: skip
TOP_LEVEL = {
    "megavl", "launch", "data_tools", "tests",
    "Makefile", "setup.py", "README.md", "pyproject.toml", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
}  # fmt: skip


def test_top_level_names(root: Path) -> None:
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("not a git checkout, so the project's files cannot be told from the user's")
    command = ["git", "-c", "safe.directory=*", "ls-tree", "--name-only", "HEAD"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in listed if not name.startswith(".")} <= TOP_LEVEL


def test_file_length(python_files: list[Path], project_files: list[Path], root: Path) -> None:
    files = [*python_files, *(path for path in project_files if path.suffix == ".sh")]
    lengths = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in files}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_function_length(python_files: list[Path], root: Path) -> None:
    long = [
        f"{path.relative_to(root)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in python_files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_init_files_hold_a_docstring_only(python_files: list[Path], root: Path) -> None:
    wrong = []
    for path in python_files:
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            if ast.get_docstring(tree) is None or len(tree.body) != 1:
                wrong.append(str(path.relative_to(root)))
    assert wrong == []


def test_names_say_what_is_inside(python_files: list[Path], root: Path) -> None:
    wrong = []
    for path in python_files:
        parts = path.relative_to(root).with_suffix("").parts
        wrong += [str(path.relative_to(root)) for part in parts if part in CATCH_ALL_NAMES]
        # A module named like a library shadows it when its folder is the start of the search path.
        wrong += [str(path.relative_to(root)) for part in parts if part in LIBRARIES]
    assert wrong == []


def test_every_package_explains_itself(root: Path) -> None:
    packages = [path.parent for path in (root / "megavl").glob("*/__init__.py")] + [
        root / "data_tools",
        root / "launch",
    ]
    assert [str(path.relative_to(root)) for path in packages if not (path / "README.md").is_file()] == []


def test_unit_tests_mirror_the_packages(root: Path) -> None:
    packages = {path.name: path for path in (root / "megavl").iterdir() if path.is_dir()}
    packages |= {name: root / name for name in ("data_tools", "launch")}
    wrong = {}
    for name, package in packages.items():
        tests = root / "tests" / "unit" / name
        here, there = _folders(package, "*.py"), _folders(tests, "test_*.py")
        if here != there:
            wrong[str(tests.relative_to(root))] = here ^ there
    assert wrong == {}


def _folders(path: Path, pattern: str) -> set[str]:
    """Folders that hold such files; one that is named like a file is a program."""
    found = path.iterdir() if path.is_dir() else ()
    return {child.name for child in found if "." not in child.name and any(child.rglob(pattern))}
