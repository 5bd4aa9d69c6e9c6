"""The tokenizer of the tiny models, written once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megavl.data.tokenizer import Tokenizer


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
