"""The small dataset that the end-to-end tests train on, and the benchmarks as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.tiny_run import build_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for all tests of a process."""
    return build_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def open_benchmark() -> Callable[[str], ModuleType]:
    """Imports a file of launch/bench/, which is no package: only its neighbours import it otherwise."""

    def open_file(name: str) -> ModuleType:
        path = Path(__file__).resolve().parents[2] / "launch/bench" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Where dataclasses look for their module.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return open_file
