"""A picture, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.generate import models


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_picture(tmp_path_factory.mktemp("pictures") / "a.png", seed=1)
