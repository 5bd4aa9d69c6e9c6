"""Folders of tiny models, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavl.data.tokenizer import Tokenizer, open_tokenizer
from tests.unit.generate import models


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return open_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_picture(tmp_path_factory.mktemp("pictures") / "a.png", seed=1)
