"""The tokenizer of the tiny models, written once, and the mark on tests that start processes."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megavl.data.tokenizer import Tokenizer

_STARTERS = (subprocess, multiprocessing)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of a file that can start processes; `make quick` leaves these out."""
    for item in items:
        module = getattr(item, "module", None)
        if module is not None and any(_can_start(found) for found in (module, *_helpers(module))):
            item.add_marker(pytest.mark.processes)


def _can_start(module: ModuleType) -> bool:
    return any(value is starter for value in vars(module).values() for starter in _STARTERS)


def _helpers(module: ModuleType) -> list[ModuleType]:
    """Modules of the tests from which a test file imports something."""
    names = {getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in vars(module).values()}
    return [sys.modules[name] for name in names if str(name).startswith("tests.") and name in sys.modules]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with BOS 0, EOS 1, padding 2 and the image token 3."""
    # Here, because most unit tests need neither torch nor megatron-core.
    from launch.bench.engines.random_models import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    from megavl.data.tokenizer import open_tokenizer

    return open_tokenizer(tokenizer_dir)
