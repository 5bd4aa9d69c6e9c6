"""The tokenizer of the tests of readers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.corpus_files import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a byte-level BPE tokenizer with the image token."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
