"""The small dataset that the end-to-end tests train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_run import build_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once for all tests of a process."""
    return build_dataset(tmp_path_factory.mktemp("dataset"))
